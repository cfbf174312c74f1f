"""Show lengths and documents of token files; the same as `hybrid-train data inspect`.

python data_tools/inspect_shard.py input=data/whole document=0
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "inspect", *sys.argv[1:]]))
