"""PEFT adapters: read, imported as deltas, written."""
