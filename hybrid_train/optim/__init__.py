"""Learning rates, groups of parameters, and AdamW with reduced-precision state on a CPU.

Not here: Megatron's optimizers (`megatron/optimizers.py`), when a step is taken (`training`).
"""
