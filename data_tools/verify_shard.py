"""Read token files whole and say what is wrong with them; the same as `hybrid-train data verify`.

python data_tools/verify_shard.py input=data/whole
"""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # the processes that it starts import this file again
    sys.exit(main(["data", "verify", *sys.argv[1:]]))
