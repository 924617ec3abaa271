"""Variants as living things: what operators have said of them, kept over restarts."""
