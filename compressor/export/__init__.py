"""A delta becomes a model, or what other tools read."""
