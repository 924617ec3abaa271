"""CPU kernels compiled by numba, run by the OpenMP threads that torch already has.

A kernel is a C function of one argument, the address of an int64 array: ``[0]`` is the number of
the next task, which the threads count up together, the rest are the kernel's own arguments
(addresses, strides, sizes). The torch function of the same name in `server.ops` is its oracle.
"""
