"""Families of Hugging Face: a file each, with its keys of config.json and its names of tensors.

Not here: which family a folder is of or a model becomes (`hf/config_json.py`), and how tensors
travel (`hf/read.py`, `hf/write.py`).
"""
