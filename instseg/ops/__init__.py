"""Operators of our own, compiled from ``csrc/`` for the CPU and for CUDA.

One module each: the public function, its documentation, autograd formula, fake kernel and a slow
reference in plain Python.
"""
