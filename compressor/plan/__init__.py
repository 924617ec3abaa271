"""How many bytes every tensor gets, and what the artifact will weigh."""
