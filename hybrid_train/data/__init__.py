"""From text to batches: tokenizers, token files here or behind a URL, made-up streams, the loader.

Not here: the phases that rows are drawn for (`planning/phases.py`), what is done with a batch
(`training`).
"""
