"""Distillation: what a teacher says, kept on disk or computed ahead, and what a student learns of it.

Not here: the losses themselves (`ops/divergence.py`), the step (`training/engine.py`).
"""
