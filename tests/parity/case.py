"""A model, a batch and a layout; what one process computes with them is the reference."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hybrid_train.data.batch import Batch
from hybrid_train.schema.model import (
    Attention,
    AttentionSizes,
    LayerRule,
    Mamba,
    MambaSizes,
    Mlp,
    MlpSizes,
    Model,
    Moe,
    MoeSizes,
)
from hybrid_train.schema.objective import Distill, HiddenStates, WeighedTeacher
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, NumberFormat, Precision
from hybrid_train.schema.train import TrainJob
from tests.packed import packed_batch
from tests.tiny import VOCAB, as_family, batch_of, tiny_job

STEPS, RATE = 3, 1e-3
PATTERN = "MEM*M-E*/*E/*E"
LENGTH, BATCH = 16, 8
# Sixteenths of a row that its documents take: padding of every size, ends on and off the pieces of
# context parallelism, documents over several of them.
DOCUMENTS = (
    (5, 1, 7), (16,), (3, 3, 3, 3), (1, 2, 13), (9,), (8, 8), (4, 10, 1), (2, 6, 5),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A layout of one model, and how many processes run it."""

    job: TrainJob
    processes: int
    packed: bool = False  # several documents in a row, and padding
    steps: int = STEPS


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


def full_width(case: Case) -> Case:
    """Return the same case with experts of the width of the model, not of a latent one."""
    changed = copy.deepcopy(case)
    changed.job.model.moe.latent_size = None
    return changed


def packed(case: Case) -> Case:
    """Return the same case on packed rows."""
    return replace(case, packed=True)


def taught(
    case: Case,
    layers: Mapping[int, int] | None = None,
    weights: Sequence[float] = (1.0,),
    top_k: int | None = None,
) -> Case:
    """Return the same case with teachers, and all that its loss is a mixture of.

    Args:
        case: without one.
        layers: of the student, and those of the teacher that their hidden states are drawn to.
        weights: of the teachers.
        top_k: tokens of each teacher that are told apart; None: all.
    """
    job = copy.deepcopy(case.job)
    job.objective = Distill(
        moe_aux_loss_scale=job.objective.moe_aux_loss_scale,
        teachers=[WeighedTeacher(checkpoint="of the reference", weight=one) for one in weights],
        top_k=top_k,
        temperature=2.0,
        reverse_share=0.3,
        cross_entropy_share=0.2,
        hidden=HiddenStates(
            layers=list(layers or {}), teacher_layers=list((layers or {}).values()), weight=0.5
        ),
    )
    return replace(case, job=job)


def quantized(case: Case, format: GemmFormat) -> Case:
    """Return the same case with quantized GEMMs, for one step.

    Scales are powers of two: values that are split otherwise, and so scaled otherwise, round to the
    same. In later steps the last bit of a sum may send a value to its other neighbour, and a token
    to another expert: nothing bounds that.
    """
    job = copy.deepcopy(case.job)
    job.precision = Precision(
        format=format,
        unquantized=NumberFormat.fp32,
        power_of_two_scales=True,
        stochastic_rounding=False,  # its noise differs from rank to rank
    )
    return replace(case, job=job, steps=1)


def unequal(parallel: Parallel, pattern: str, data: int = 1) -> Case:
    """Return a model whose layers have sizes of their own, under a layout.

    Three widths of MLP layers, two numbers of experts, two of Mamba heads and of attention heads.
    """
    case = case_of(parallel, pattern, data)
    case.job.model.layers = [
        LayerRule(layers="4", mamba=MambaSizes(heads=16)),
        LayerRule(layers="5", attention=AttentionSizes(heads=8, kv_heads=4)),
        LayerRule(layers="7", mlp=MlpSizes(intermediate_size=96)),
        LayerRule(layers="last 2", mlp=MlpSizes(intermediate_size=32)),
        LayerRule(layers="8", moe=MoeSizes(experts=4, shared_intermediate_size=64)),
        LayerRule(moe=MoeSizes(intermediate_size=24)),
    ]
    return case


def dense(family: str, parallel: Parallel, stages: int = 1, data: int = 1) -> Case:
    """Return a Transformer of a family under a layout.

    Args:
        family: "llama", "qwen" with all that both have beside it, "nemotron"; "hybrid": all kinds
            of layers and MTP, with positions.
        parallel: the layout.
        stages: chunks of layers, all pipeline stages and virtual ones.
        data: data-parallel ranks.
    """
    letters = "MEM*M-E*" if family == "hybrid" else "*-" * 4
    cut = len(letters) // stages
    main = "|".join(letters[start : start + cut] for start in range(0, len(letters), cut))
    case = case_of(parallel, main + "/*E/*E" * (family == "hybrid"), data)
    as_family(case.job.model, family)
    return case


def needed_processes(parallel: Parallel, data: int = 1) -> int:
    """Return how many processes a layout takes, with at least `data` data-parallel ranks."""
    dense = parallel.tensor * parallel.pipeline * parallel.context * data
    expert_tensor = parallel.expert_tensor or parallel.tensor
    return math.lcm(dense, expert_tensor * parallel.expert * parallel.pipeline)


def microbatches_of(case: Case) -> list[Batch]:
    """Return the microbatches of a step over all data-parallel ranks.

    Sequences have different numbers of valid labels, so that a mean over a part of them is not the
    mean over all.
    """
    train = case.job.train
    generator = torch.Generator().manual_seed(train.seed)
    rows = torch.randint(
        VOCAB, (train.global_batch, train.sequence_length + 1), generator=generator
    )
    if case.packed:
        cut = [list(_documents(*row)) for row in zip(rows.numpy(), DOCUMENTS, strict=True)]
        return [
            packed_batch(cut[start : start + train.microbatch], train.sequence_length)
            for start in range(0, train.global_batch, train.microbatch)
        ]
    mask = torch.ones(train.global_batch, train.sequence_length)
    for number in range(train.global_batch):
        mask[number, : (number * 5) % (train.sequence_length // 2)] = 0.0
    parts = zip(rows.split(train.microbatch), mask.split(train.microbatch), strict=True)
    return [batch_of(*part) for part in parts]


def _documents(row: np.ndarray, sixteenths: tuple[int, ...]) -> Iterator[np.ndarray]:
    unit, start = len(row) // 16, 0
    for count in sixteenths:
        yield row[start : start + count * unit + 1]
        start += count * unit
