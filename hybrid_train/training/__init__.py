"""The one loop, the step, objectives, networks with their optimizers, and hooks.

Not here: how a run is put together (`jobs/pretraining.py`), how networks and objectives are built
(`jobs/networks.py`), forward and backward passes (`megatron/forward_backward.py`).
"""
