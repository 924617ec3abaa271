"""Online half of the project: serve one base model and many compressed fine-tunes of it."""
