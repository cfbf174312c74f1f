"""The command `hybrid-train`, also `python -m hybrid_train`."""

import sys

from hybrid_train.jobs.cli import main

if __name__ == "__main__":  # processes that data loading starts import this file again
    sys.exit(main())
