"""A base and a fine-tune become a delta artifact."""
