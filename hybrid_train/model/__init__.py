"""The hybrid model of a job: built, initialised, changed by edits, observed.

Not here: the classes it is made of (`megatron`), losses and steps (`training`).
"""
