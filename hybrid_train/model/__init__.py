"""The hybrid model: build it, count it.

Not here: losses and steps (`training`).
"""
