"""Reactions to events of the loop, one concern a file.

Not here: the loop itself (`training/loop.py`).
"""
