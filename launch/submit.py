#!/usr/bin/env python3
"""Submit a training run to SLURM; the same for one node and for a thousand.

launch/submit.py --dry-run experiment=nemotron_h_56b cluster=slurm_h100 cluster.nodes=8
"""

import sys
from pathlib import Path

from hybrid_train.jobs.submit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
