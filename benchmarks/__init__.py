"""Measurements: load on a server (`serve`) and what compression costs in quality (`quality`)."""
