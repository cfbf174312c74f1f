"""Distillation: teachers run ahead of a student, and how far it is from them is its loss.

Not here: the loss of a token (`ops/divergence.py`), and the step that takes any objective
(`training`).
"""
