"""Distillation: teachers run ahead of a student, or once and for all; how far it is from them.

Not here: the losses (`ops/divergence.py`), the step (`training/engine.py`).
"""
