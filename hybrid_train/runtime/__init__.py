"""A process and its machine: device, ranks, seeds, logs, heartbeat, signals, optional libraries.

Not here: which ranks talk to each other (`megatron/data_parallel.py`), the model (`model`).
"""
