"""Whole weights of a hot variant: when they are worth it, and how they come and go."""
