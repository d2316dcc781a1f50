"""Passes over memory, in Triton, Numba and PyTorch, and the tensors that they work on."""
