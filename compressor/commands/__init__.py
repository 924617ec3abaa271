"""Subcommands of ``impart`` that have a module of their own; `compressor.cli` registers them."""
