"""What the checks let pass, Megatron-Core builds; what they refuse, their nearest value fixes.

Each example is a run of up to some dozen processes. This process is one of them, in a group whose
collectives do nothing (torch's own fake backend): that is enough to build the groups, the config
and the model part of a rank, which is where core checks its sizes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hybrid_train.config.checks import check
from hybrid_train.config.compose import compose
from hybrid_train.planning import stages
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.job_roots import CheckJob
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob
from tests.tiny import MEGATRON_WARNINGS, VOCAB

pytestmark = MEGATRON_WARNINGS
TINY = compose("check", ["experiment=tiny_cpu"])
DEGREE = st.sampled_from([1, 1, 1, 2, 2, 3, 4])
SIZE = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])
WIDTH = st.sampled_from([8, 12, 24, 36, 48])
CHOICES = {
    "model.pattern": st.sampled_from(
        ["M-", "--", "M", "M*", "*-*-", "ME", "MEM*M-", "MEM*M-/*E", "M-M-/M-/M-", "M|EM*-", "E|M-"]
    ),
    "model.hidden_size": WIDTH,
    "model.vocab_multiple": SIZE,
    "model.attention.heads": SIZE,
    "model.attention.kv_heads": SIZE,
    "model.attention.head_dim": st.sampled_from([1, 2, 4, 8]),
    "model.mamba.heads": SIZE,
    "model.mamba.groups": SIZE,
    "model.mamba.head_dim": st.sampled_from([2, 8]),
    "model.mlp.intermediate_size": WIDTH,
    "model.moe.experts": SIZE,
    "model.moe.top_k": st.sampled_from([1, 2]),
    "model.moe.intermediate_size": WIDTH,
    "model.moe.shared_intermediate_size": st.one_of(st.none(), WIDTH),
    "model.moe.latent_size": st.one_of(st.none(), WIDTH),
    "model.tie_embeddings": st.booleans(),
    "model.mtp.repeated_block": st.booleans(),
    "parallel.tensor": DEGREE,
    "parallel.pipeline": DEGREE,
    "parallel.virtual_pipeline": DEGREE,
    "parallel.expert": DEGREE,
    "parallel.expert_tensor": st.one_of(st.none(), DEGREE),
    "parallel.context": DEGREE,
    "parallel.sequence": st.sampled_from([None, None, None, True, False]),
    "train.sequence_length": st.sampled_from([1, 8, 24, 31, 48]),
    "train.microbatch": st.sampled_from([1, 2, 3]),
    "train.global_batch": st.sampled_from([1, 12, 48, 50]),
    "processes": st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24]),
}


def with_values(job: CheckJob, values: dict[str, Any]) -> CheckJob:
    changed = copy.deepcopy(job)
    for path, value in values.items():
        *sections, name = path.split(".")
        setattr(reduce(getattr, sections, changed), name, value)
    return changed


JOBS = st.fixed_dictionaries(CHOICES).map(lambda values: with_values(TINY, values))


def problems(job: CheckJob) -> list[Problem]:
    return list(check(job, job.processes))


def mended(job: CheckJob, found: list[Problem]) -> CheckJob:
    """Put all that is offered in place; test_checks.py does so by overrides, as a user would."""
    words = {"null": None, "true": True, "false": False}
    offered = [(problem.path, problem.nearest) for problem in found]
    offered += [pair for problem in found for pair in problem.along]
    values = {path: value for path, value in offered if value is not None}
    return with_values(job, {path: words.get(value, value) for path, value in values.items()})  # type: ignore[call-overload]


@contextmanager
def one_of(processes: int, rank: int) -> Iterator[None]:
    """Be one process of so many, in a group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_chunk(job: TrainJob, processes: int) -> Any:
    """Build the model chunk of the first of so many processes."""
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model

    with one_of(processes, 0):
        groups = build_groups(job.parallel, timeout_s=60)
        try:
            (chunk,) = build_model(job, groups, VOCAB, on_gpu=False).chunks
        finally:
            destroy_groups()
    return chunk


def build(job: CheckJob, rank: int) -> tuple[int, int]:
    """Build the part of a rank; return its parameters, and those that the plan says it holds."""

    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model

    assert isinstance(job.data, Quickstart)
    vocab_size = job.data.vocab_size
    rows = padded_vocab_size(vocab_size, job.model.vocab_multiple)
    with one_of(job.processes, rank):
        groups = build_groups(job.parallel, timeout_s=60)
        try:
            built = build_model(job, groups, vocab_size, on_gpu=False)
            of_pipeline = groups.pp.rank()
        finally:
            destroy_groups()
    planned = stages.stages(job, rows)
    held = sum(stage.held.total for stage in planned if stage.rank == of_pipeline)
    return sum(one.numel() for chunk in built.chunks for one in chunk.parameters()), held


@pytest.fixture(scope="module")
def emulated() -> None:
    """Send what asks for CUDA to the CPU, for the rest of this process, as `groups` does."""
    from hybrid_train.runtime import cpu

    cpu.install()


ODD = [HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
PLACES = st.floats(0, 1, exclude_max=True)


def built_as_planned(job: CheckJob, place: float) -> None:
    # Most examples break a rule; with advice taken they are the odd layouts worth building.
    sound = mended(job, problems(job))
    assume(sound.processes <= 96)
    built, planned = build(sound, rank=int(place * sound.processes))
    assert built == planned


@settings(max_examples=8, suppress_health_check=ODD)
@given(job=JOBS, place=PLACES)
def test_what_passes_is_built_and_holds_what_the_plan_says(
    emulated: None, job: CheckJob, place: float
) -> None:
    built_as_planned(job, place)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=ODD)
@given(job=JOBS, place=PLACES)
def test_more_of_what_passes_is_built_and_holds_what_the_plan_says(
    emulated: None, job: CheckJob, place: float
) -> None:
    built_as_planned(job, place)


@settings(max_examples=15)
@given(job=JOBS)
def test_all_that_is_offered_taken_at_once_leaves_no_problem(job: CheckJob) -> None:
    mended_at_once(job)


@pytest.mark.slow
@settings(max_examples=200)
@given(job=JOBS)
def test_all_that_is_offered_taken_at_once_leaves_no_problem_for_more_jobs(job: CheckJob) -> None:
    mended_at_once(job)


def mended_at_once(job: CheckJob) -> None:
    found = problems(job)
    assert all(problem.nearest is not None or problem.along for problem in found)
    assert problems(mended(job, found)) == []
