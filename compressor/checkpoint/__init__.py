"""Hugging Face checkpoints: read, compared, written."""
