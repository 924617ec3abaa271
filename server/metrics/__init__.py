"""Prometheus metrics: what is counted, and what is read off the engine."""
