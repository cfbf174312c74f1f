"""From raw text to token files, and what is done with token files outside a run.

Not here: reading tokenizers (`data/tokenizers.py`, `data/sentencepiece.py`), the format of token
files (`data/token_files.py`, `data/token_files.py`), batches of a run (`data/loader.py`).
"""
