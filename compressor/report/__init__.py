"""One HTML page about deltas of a fine-tune."""
