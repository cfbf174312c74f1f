"""Split token files by shares or by tokens; the same as `hybrid-train data split`.

python data_tools/split_shard.py input=data/whole output=data/part tokens_per_shard=1B
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "split", *sys.argv[1:]]))
