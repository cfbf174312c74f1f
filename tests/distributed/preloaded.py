"""Imports that every process of a distributed test needs, made once in the process they fork from.

Nothing here may compute in parallel: a fork does not take the threads along.
"""

import importlib
import logging
import warnings

import torch

from hybrid_train.runtime import cpu
from tests.warm.server import PRELOADED

warnings.simplefilter("ignore")  # Megatron's, of its own defaults; nobody reads them in a rank
logging.getLogger("megatron").setLevel(logging.ERROR)
torch.set_num_threads(1)  # the ranks share the cores of one machine
cpu.install()

# After the emulation is in place; tests.tiny brings pytest.
for name in (*PRELOADED, "hybrid_train.data.prepare.tokenization", "tests.tiny"):
    importlib.import_module(name)
