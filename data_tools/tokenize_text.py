"""Turn text into token files; the same as `hybrid-train data tokenize`.

python data_tools/tokenize_text.py input=corpus.jsonl output=data/corpus tokenizer=FOLDER
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "tokenize", *sys.argv[1:]]))
