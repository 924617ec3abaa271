"""How far a compressed model is from its fine-tune."""
