"""The one loop, the step, objectives and hooks.

Not here: the wiring of a run (`jobs`).
"""
