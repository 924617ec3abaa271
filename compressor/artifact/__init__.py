"""The delta artifact on disk: written, read, described. FORMAT.md beside this says each byte."""
