"""A tiny job with every kind of layer, the engine it becomes, and rows of tokens to feed it."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.runtime.start import process
from hybrid_train.schema.model import (
    Activation,
    Attention,
    Mamba,
    Mlp,
    Model,
    Moe,
    NormKind,
    Rope,
    RopeScaling,
)
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import Train, TrainJob

if TYPE_CHECKING:
    from hybrid_train.megatron.hybrid import Hybrid
    from hybrid_train.training.engine import Engine

# What these two say of their own defaults and calls; a run ignores it too (runtime/logs.py).
MEGATRON_WARNINGS = [
    pytest.mark.filterwarnings(r"ignore::Warning:megatron\."),
    pytest.mark.filterwarnings(r"ignore::Warning:torch\.distributed"),
]

EVERY_KIND = "MEM*M-/*E/*E"
VOCAB = 61  # padded to 64 rows
LENGTH = 16
BATCH = 4  # sequences of one step
RUNTIME = Runtime(device=Device.cpu, kernels=Kernels.plain, threads=1)


def as_family(model: Model, family: str) -> None:
    """Give a model what the layers of a family of Transformers have, and the hybrids have not.

    Args:
        model: is changed.
        family: "llama", "qwen" (2 and 3 at once) or "nemotron"; "hybrid": a model of all kinds of
            layers with positions, biases and norms of heads.
    """
    attention, mlp = model.attention, model.mlp
    attention.rope = Rope(theta=100.0, fraction=1.0 if family == "llama" else 0.5)
    if family == "llama":
        attention.rope.scaling, attention.rope.original_length = RopeScaling.llama3, LENGTH
    if family in ("llama", "qwen"):
        mlp.activation, mlp.gated = Activation.silu, True
    attention.qkv_bias = attention.qk_norm = family in ("qwen", "hybrid")
    model.tie_embeddings = family == "qwen"
    model.norm = NormKind.layer_1p if family == "nemotron" else NormKind.rms


def tiny_job(pattern: str = EVERY_KIND, **sections: Any) -> TrainJob:
    """A job whose sections can be replaced one by one."""
    job = TrainJob(
        run_dir="unused",
        train=Train(tokens="1M", sequence_length=LENGTH, microbatch=2, global_batch=BATCH),
        model=Model(
            pattern=pattern,
            hidden_size=32,
            vocab_multiple=16,
            attention=Attention(heads=4, kv_heads=2, head_dim=8),
            mamba=Mamba(heads=4, head_dim=16, state_size=8, groups=2, chunk_size=8),
            mlp=Mlp(intermediate_size=64),
            moe=Moe(
                experts=4, top_k=2, intermediate_size=32, shared_intermediate_size=48,
                latent_size=16, scaling_factor=2.5,
            ),
        ),
        precision=Precision(format=GemmFormat.fp32),
        schedule=Schedule(peak_lr=1e-3),
        runtime=RUNTIME,
    )  # fmt: skip
    for name, section in sections.items():
        assert hasattr(job, name)
        setattr(job, name, section)
    return job


@contextlib.contextmanager
def alone() -> Iterator[Any]:
    """Make this process a run of one, with Megatron's groups; yields the groups."""
    with process(RUNTIME, seed=1234):
        from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

        groups = build_groups(Parallel(), timeout_s=60)
        try:
            yield groups
        finally:
            destroy_groups()


def tiny_model(job: TrainJob, groups: Any) -> "Hybrid":
    """The model of a job, on one process."""
    from hybrid_train.model.build import build_model

    return build_model(job, groups, VOCAB, on_gpu=False).chunks[0]


def losses_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of all losses, with gradients, and the losses of every depth, [1 + D, B, S].

    Each loss counts what the batch weighs its label.
    """
    from hybrid_train.schema.objective import NextToken as Settings
    from hybrid_train.training.next_token import NextToken

    depths, groups = model.mtp_num_depths, model.pg_collection
    section = Model(pattern="M" + "/M" * depths)  # of which the objective counts the depths alone
    given: Any = SimpleNamespace(model=section, groups=groups)
    objective = NextToken(Settings(mtp_loss_scale=depths), given)
    ones = torch.ones(1 + depths, device=batch.tokens.device)
    output: Any = objective.forward(model, batch, ones)[0]
    return output[0], output[1]


def tiny_engine(job: TrainJob, groups: Any) -> "Engine":
    """The engine of a job: model, data parallelism, optimizer, objective."""
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    built = build_model(job, groups, VOCAB, on_gpu=False)
    return build_engine(job, built, groups, torch.device("cpu"))


def some_rows(number: int = BATCH, seed: int = 0) -> Tensor:
    """Sequences of LENGTH + 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (number, LENGTH + 1), generator=generator)


def batch_of(rows: Tensor, mask: Tensor | None = None) -> Batch:
    """One microbatch of these rows; every label counts unless `mask` says otherwise."""
    tokens, labels = rows[:, :-1], rows[:, 1:]
    mask = torch.ones(tokens.shape) if mask is None else mask
    return Batch(tokens, labels, mask, torch.arange(tokens.shape[1]).expand_as(tokens))


def microbatches(rows: Tensor, size: int, mask: Tensor | None = None) -> Iterator[Batch]:
    """The rows in microbatches of `size`, again and again."""
    mask = torch.ones(rows[:, 1:].shape) if mask is None else mask
    while True:
        for part, part_mask in zip(rows.split(size), mask.split(size), strict=True):
            yield batch_of(part, part_mask)
