"""Compression: what of a model matters, and a smaller one made of what does.

Not here: what a selection means for a tensor (`anatomy/selection.py`), how a checkpoint lies on
disk (`checkpoint`), the loss that heals a pruned model (`distillation`).
"""
