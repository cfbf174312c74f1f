"""Runs `hybrid-train train`; a weight becomes NaN before a step: POISON=step:rank:parameter."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from hybrid_train.jobs import cli, train


@contextlib.contextmanager
def poisoned_process(*args: Any) -> Iterator[torch.device]:
    """Be the context of the job, with a step that spoils a weight first."""
    with start(*args) as device:
        from hybrid_train.training.engine import Engine  # imports Megatron: not before

        step, rank, parameter = os.environ["POISON"].split(":")
        true_step = Engine.step

        def poisoned_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
            if self.steps_done + 1 == int(step) and os.environ.get("RANK", "0") == rank:
                weights = dict(self.network.chunks[0].module.named_parameters())
                weights[parameter].data.flatten()[0] = float("nan")
            return true_step(self, *args, **kwargs)

        Engine.step = poisoned_step
        yield device


start = train.process
train.process = poisoned_process
sys.exit(cli.main())
