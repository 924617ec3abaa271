"""Scheduling, paged KV cache, forward pass, sampling; no HTTP."""
