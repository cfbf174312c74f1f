"""Weight decay reaches the same parameters when their state is split over two processes."""

from typing import Any

import torch

from hybrid_train.optim.groups import decays
from hybrid_train.runtime import cpu
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.tiny import MEGATRON_WARNINGS, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
RATE, DECAY = 0.25, 0.5  # powers of two: 1 - rate * decay is exact


def _decay_alone() -> None:
    """With gradients of zero, AdamW does nothing but multiply by 1 - rate * decay."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.megatron.optimizers import set_learning_rate

    for parallel in (Parallel(), Parallel(expert=2), Parallel(tensor=2)):
        job = tiny_job(parallel=parallel, schedule=Schedule(peak_lr=RATE))
        job.optimizer.weight_decay = DECAY
        groups = build_groups(parallel, timeout_s=60)
        engine = tiny_engine(job, groups)
        weights: dict[str, Any] = dict(engine.network.chunks[0].named_parameters())
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        engine.network.chunks[0].zero_grad_buffer()
        set_learning_rate(engine.network.optimizer, RATE)
        engine.network.optimizer.step()
        for name, weight in weights.items():
            factor = 1 - RATE * DECAY if decays(job.optimizer, name) else 1.0
            assert torch.equal(weight, factor * before[name]), name
        destroy_groups()


def test_only_what_decays_shrinks_when_its_state_is_split() -> None:
    run_distributed(_decay_alone, 2)
