"""From text to batches: tokenizer, token files, loader.

Not here: what is done with a batch (`training`).
"""
