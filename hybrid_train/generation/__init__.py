"""Text from a model: decoding, sampling, the cache of its layers (`decode.py`); scores of texts.

Not here: reading checkpoints (`checkpoint`), tokenizers (`data/any_tokenizer.py`), the command
(`jobs/generate.py`).
"""
