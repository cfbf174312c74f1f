"""Join token files of one tokenizer; the same as `hybrid-train data merge`.

python data_tools/merge_shards.py input=data/part-* output=data/whole
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "merge", *sys.argv[1:]]))
