"""Text from a model: decoding, sampling, and the cache of its layers (`decode.py`).

Not here: reading checkpoints (`checkpoint`), tokenizers (`data/any_tokenizer.py`), the command
(`jobs/generate.py`).
"""
