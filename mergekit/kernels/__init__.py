"""Fused kernels for the CPU (numba) and their torch twins: decode, encode, Gram matrix, weighted sums, selection.

Here: arithmetic on blocks of raw bytes. Not here: files, names, methods. A kernel decodes a block by its element type
once and then works on float32; the number of models is a run-time loop, so the set of compiled functions stays small.
"""
