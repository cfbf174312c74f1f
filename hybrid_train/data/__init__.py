"""From text to batches: tokenizer, token files here or behind a URL, made-up streams, loader.

Not here: what is done with a batch (`training`).
"""
