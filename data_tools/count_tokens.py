"""Count documents and tokens of token files; the same as `hybrid-train data count`.

python data_tools/count_tokens.py input=data/*
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "count", *sys.argv[1:]]))
