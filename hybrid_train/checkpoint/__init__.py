"""Save, find, load and delete checkpoints.

Not here: when to save (`training/hooks`).
"""
