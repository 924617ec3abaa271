"""What the CPU kernels are written in: vectors, bfloat16, loads, products of tiles."""
