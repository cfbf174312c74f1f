"""Train a byte-level BPE tokenizer from text; the same as `hybrid-train data train_tokenizer`.

python data_tools/train_tokenizer.py input=corpus.jsonl output=tokenizer vocab_size=32768
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "train_tokenizer", *sys.argv[1:]]))
