"""Operators compiled from ``csrc/`` for the CPU and for CUDA.

Each has a module with the public function, its documentation, autograd formula, fake kernel and a
slow reference in plain Python.
"""
