"""Processes that do the work on text which strangers wrote, within limits."""
