"""Text from a model: requests in a batch, choice of tokens, chats, answers; scores of texts.

Not here: what layers remember (`megatron/row_cache.py`), reading checkpoints (`checkpoint`),
tokenizers (`data/any_tokenizer.py`), the command (`jobs/generate.py`).
"""
