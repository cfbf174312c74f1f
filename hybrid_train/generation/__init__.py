"""Text from a model: cache, sampling, decoding.

Not here: reading checkpoints (`checkpoint`).
"""
