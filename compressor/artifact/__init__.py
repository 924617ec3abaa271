"""The delta artifact on disk: read, checked, written, described."""
