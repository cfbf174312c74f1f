"""A model, a batch and a layout; what one process computes with them is the reference."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.config.schema.model import Attention, Mamba, Mlp, Model, Moe
from hybrid_train.config.schema.parallel import Parallel
from hybrid_train.config.schema.train import TrainJob
from tests.tiny import tiny_job

STEPS, RATE = 3, 1e-3
PATTERN = "MEM*M-E*/*E/*E"
LENGTH, BATCH = 16, 8


@dataclass(frozen=True)
class Case:
    """A layout of one model, and how many processes run it."""

    job: TrainJob
    processes: int


def parity_job(pattern: str = PATTERN) -> TrainJob:
    """Return a job on one process whose sizes can be split four ways."""
    job = tiny_job(pattern)
    job.model = Model(
        pattern=pattern,
        hidden_size=32,
        vocab_multiple=16,
        attention=Attention(heads=4, kv_heads=2, head_dim=8),
        mamba=Mamba(heads=8, head_dim=8, state_size=8, groups=4, chunk_size=8),
        mlp=Mlp(intermediate_size=64),
        moe=Moe(
            experts=8, top_k=2, intermediate_size=32, shared_intermediate_size=48,
            latent_size=16, scaling_factor=2.5,
        ),
    )  # fmt: skip
    job.train.sequence_length, job.train.global_batch = LENGTH, BATCH
    job.schedule.peak_lr = RATE
    job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
    job.optimizer.clip_grad_norm = 0.5  # less than the norm: clipping works
    return job


def case_of(parallel: Parallel, pattern: str = PATTERN, data: int = 1) -> Case:
    """Return the parity model under a layout, on as few processes as it needs."""
    job = parity_job(pattern)
    job.parallel = parallel
    return Case(job, needed_processes(parallel, data))


def needed_processes(parallel: Parallel, data: int = 1) -> int:
    """Return how many processes a layout takes, with at least `data` data-parallel ranks."""
    dense = parallel.tensor * parallel.pipeline * parallel.context * data
    expert_tensor = parallel.expert_tensor or parallel.tensor
    return math.lcm(dense, expert_tensor * parallel.expert * parallel.pipeline)


def rows_of(job: TrainJob, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the sequences of a step, [B, S + 1], and which labels count, [B, S].

    Sequences have different numbers of valid labels, so that a mean over a part of them is not the
    mean over all.
    """
    batch, length = job.train.global_batch, job.train.sequence_length
    generator = torch.Generator().manual_seed(job.train.seed)
    rows = torch.randint(vocab_size, (batch, length + 1), generator=generator)
    mask = torch.ones(batch, length)
    for number in range(batch):
        mask[number, : (number * 5) % (length // 2)] = 0.0
    return rows, mask
