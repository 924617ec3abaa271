"""Slot arrays: the resident terms of one parameter, all those of one geometry in one tensor.

A geometry is what a grouped GEMM needs equal: number of blocks, rank, kept components. Variants
compressed with the same settings share a pool; others get a pool of their own.

Tensor parallelism: parts shard as the modules of their operations say (`server.ops.packed` for
blocks, `server.ops.factors` and `server.ops.lowrank` for factors; a whole matrix by rows or by
columns, with the base's), before they are staged: a rank would have the same pools over shorter
arrays. Vectors (norms, biases) shard with their outputs; places and segments are the same on all.
"""
