"""Optimizer and learning-rate schedules.

Not here: when a step is taken (`training`).
"""
