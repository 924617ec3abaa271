"""Measurements on one GPU, and what can be known without one."""
