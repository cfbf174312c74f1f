"""A process and its machine: device, ranks, seeds, logs, signals, optional libraries.

Not here: who talks to whom (`parallel`), the model (`model`).
"""
