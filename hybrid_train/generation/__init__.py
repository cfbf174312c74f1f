"""Text from a model: requests, the engine and its cache, choice of tokens, chats, files of answers.

Not here: reading checkpoints (`checkpoint`), tokenizers (`data/any_tokenizer.py`), the command
(`jobs/generate.py`).
"""
