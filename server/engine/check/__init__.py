"""Whether the engine computes what the model's definition says."""
