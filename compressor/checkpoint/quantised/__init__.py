"""Checkpoints whose weights are stored quantised, read as the dense checkpoints they stand for."""
