"""Hugging Face folders: read into a checkpoint, written from one, and compared with one.

Not here: how a checkpoint lies on disk (`checkpoint/tensor_files.py`), what a tokenizer does
(`data/tokenizers.py`), the commands that do it (`jobs/convert.py`).
"""
