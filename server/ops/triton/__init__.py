"""Triton kernels for one GPU, each with its torch reference beside it.

Nothing here imports triton until a kernel module is imported, so the server runs without it.
"""
