"""Pretraining of hybrid Mamba-Transformer language models on Megatron-Core.

The packages are layers; each imports only from those below it (ARCHITECTURE.md draws them).
"""
