"""Distillation: teachers run ahead of a student, and how far it is from them is its loss."""
