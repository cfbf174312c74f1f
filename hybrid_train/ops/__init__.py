"""Tensor functions: a readable reference first, a fast twin beside it.

Not here: modules with parameters (`megatron/plain.py`), and GEMMs in fewer bits (`precision`).
"""
