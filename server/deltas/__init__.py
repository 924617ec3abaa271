"""Registry, loading and slots of resident deltas."""
