"""From raw text to token files, and what is done with token files outside a run.

Not here: tokenizers (`data/any_tokenizer.py`), the format of token files (`data/token_files.py`),
batches of a run (`data/loader.py`), the commands (`jobs/data_tokenize.py`, `jobs/data_files.py`).
"""
