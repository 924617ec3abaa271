"""Offline half of the project: base + full fine-tune -> a small delta artifact."""

__version__ = "0.1.0"
