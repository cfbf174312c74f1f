"""Steps of a case on the processes it needs, compared with those of one process.

The error of a part of a tensor is the root mean square of its difference. That of a gradient is
given in ulps: float32's spacing at the root mean square of the whole gradient.
"""

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.schema.objective import Distill, NextToken
from tests.parity.case import Case, microbatches_of
from tests.tiny import VOCAB, tiny_engine

EPSILON = torch.finfo(torch.float32).eps
START, REFERENCE = "checkpoints/step_00000000", "reference.pt"
TEACHER, TEACHER_SEED = "teacher_{}", 99


@dataclass
class Outcome:
    """What a rank computed: the numbers of every step, and its errors against the reference."""

    reports: list[dict[str, float]]
    gradients: dict[str, float] = field(default_factory=dict)  # ulps, of the first step
    weights: dict[str, float] = field(default_factory=dict)  # after the last step
    copies: dict[str, str] = field(default_factory=dict)  # part of a weight -> digest of its bits


def write_reference(case: Case, folder: Path) -> list[dict[str, float]]:
    """Write a checkpoint, then take steps on one process; write gradients and last weights.

    Returns:
        The numbers of every step.
    """
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import content_of
    from tests.parity import shards

    _write_teachers(case, folder)
    with _engine(case, folder) as engine:
        saved = store.save(folder, content_of(engine), {"step": 0, "tokens": 0}, keep=1)
        assert saved == folder / START
        batches = _batches(case, engine)
        first = _numbers(engine.step(batches, tokens_seen=0))
        gradients = shards.assemble(shards.gradients(engine.network.chunks))
        later = range(1, case.steps)
        reports = [first, *(_numbers(engine.step(batches, tokens_seen=0)) for _ in later)]
        weights = shards.assemble(shards.weights(engine.network.chunks))
        torch.save({"gradients": gradients, "weights": weights}, folder / REFERENCE)
    return reports


def measure(case: Case, folder: Path, fault: str | None = None) -> Outcome:
    """Load the checkpoint of the reference, take the same steps on this rank, and compare.

    Args:
        case: what to run.
        folder: where `write_reference` wrote.
        fault: name of a fault to plant, for the test that it is found.
    """
    from hybrid_train.checkpoint.save_load import read_weights
    from tests.parity import faults

    reference = torch.load(folder / REFERENCE, mmap=True)
    with _engine(case, folder) as engine:
        read_weights(folder / START, engine.network.chunks, engine.network.groups)
        engine.network.optimizer.reload_model_params()
        with faults.planted(fault, engine):
            return _compared(engine, case, reference)


def _compared(engine: Any, case: Case, reference: dict[str, dict[str, Tensor]]) -> Outcome:
    from hybrid_train.megatron.data_parallel import complete_parameters
    from tests.parity import shards

    batches = _batches(case, engine)
    outcome = Outcome([_numbers(engine.step(batches, tokens_seen=0))])
    outcome.gradients = _errors(
        shards.gradients(engine.network.chunks), reference["gradients"], True
    )
    for _ in range(1, case.steps):
        outcome.reports.append(_numbers(engine.step(batches, tokens_seen=0)))
    complete_parameters(engine.network.chunks)
    held = list(shards.weights(engine.network.chunks))
    outcome.weights = _errors(held, reference["weights"])
    outcome.copies = {
        f"{s.key} at {s.place}": digest(s.value.contiguous().numpy().tobytes()) for s in held
    }
    return outcome


def _write_teachers(case: Case, folder: Path) -> None:
    """Write the runs of teachers, if there are any: of other widths, padding and first weights."""
    from hybrid_train.checkpoint import store
    from hybrid_train.config import frozen
    from hybrid_train.training.hooks.checkpointing import content_of

    if not isinstance(case.job.objective, Distill):
        return
    for number in range(len(case.job.objective.teachers)):
        job, run_dir = copy.deepcopy(case.job), folder / TEACHER.format(number)
        job.objective, job.train.seed = NextToken(), TEACHER_SEED + number
        width, multiple = 48 - 8 * number, 80 + 16 * number
        job.model = replace(job.model, hidden_size=width, vocab_multiple=multiple, vocab_size=VOCAB)
        with _engine(replace(case, job=job), run_dir) as engine:
            frozen.freeze(job, run_dir)
            store.save(run_dir, content_of(engine), {"step": 0, "tokens": 0}, keep=1)


@contextlib.contextmanager
def _engine(case: Case, folder: Path) -> Iterator[Any]:
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    if isinstance(case.job.objective, Distill):
        case = copy.deepcopy(case)
        for number, one in enumerate(case.job.objective.teachers):
            one.checkpoint = str(folder / TEACHER.format(number))
    groups = build_groups(case.job.parallel, timeout_s=60)
    try:
        yield tiny_engine(case.job, groups)
    finally:
        destroy_groups()


def _batches(case: Case, engine: Any) -> Iterator[Batch]:
    """Deal the microbatches of the whole step out to the data-parallel ranks in turn."""
    size, rank = engine.network.groups.dp.size(), engine.network.groups.dp.rank()
    return cycle(microbatches_of(case)[rank::size])


def _numbers(report: Any) -> dict[str, float]:
    return {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}


def _errors(
    shards: Iterable[Any], whole: dict[str, Tensor], in_ulps: bool = False
) -> dict[str, float]:
    found: dict[str, float] = {}
    for shard in shards:
        reference = whole[shard.key]
        error = _size(shard.value - reference[shard.place])
        if in_ulps and error > 0:
            error /= max(EPSILON * _size(reference), torch.finfo(torch.float64).tiny)
        found[shard.key] = max(found.get(shard.key, 0.0), error)
    return found


def _size(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _bits(tensor: Tensor) -> str:
    return digest(tensor.contiguous().numpy().tobytes())


def digest(content: bytes) -> str:
    """Return a short name of some bytes."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
