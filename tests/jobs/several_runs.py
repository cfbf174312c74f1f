"""Several jobs in one Python process, as a program of the user's own calls them.

python several_runs.py JSON    a list of [name, overrides]; what goes wrong is said and left
"""

import importlib
import json
import logging
import signal
import sys

import torch.distributed as dist

from hybrid_train.config import compose
from hybrid_train.schema.problems import UserError

for name, overrides in json.loads(sys.argv[1]):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    job = importlib.import_module(f"hybrid_train.jobs.{name}")
    try:
        job.run(compose.compose(name, overrides))
    except UserError as error:
        print(f"refused: {error}")
    assert not dist.is_initialized()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert len(logging.getLogger("hybrid_train").handlers) == 1
