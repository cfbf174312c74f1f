"""Reactions to events of the loop: checkpoints, reports, rounding, profiles, and the processes.

Not here: the loop and the base class of hooks (`training/loop.py`), where they are put together
(`jobs/pretraining.py`).
"""
