"""Pretraining of hybrid Mamba-Transformer language models on Megatron-Core.

The packages are layers; each imports only from those below it (ARCHITECTURE.md draws them).
"""

__version__ = "0.1.0.dev0"  # setup.py reads this line; CONTRIBUTING.md says when it changes
