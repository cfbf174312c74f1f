"""Every number of every config: refused before anything is written, or two steps are finite.

`make test` looks at all fields of a training run and trains with a sample; the tests marked slow
ask for every value of every job, and train with each that is accepted.
`python -m tests.numbers` prints the counts.
"""

import math
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config.registry import SCHEMAS
from hybrid_train.schema.evaluation import Evaluation
from hybrid_train.schema.problems import collect
from tests.numbers import answers
from tests.numbers.answers import Pair, pairs, refusals
from tests.numbers.tried import BASES, LISTED, composer, every, fields_of, numeric_owners

SHARES = 8  # of the long form, so that several workers have something to do
SAMPLED = 97  # every so many values, so that all kinds of values come to all kinds of fields
_ONE_PROCESS = "a run of one process has one layout"
_NOTHING_REMOTE = "no source of the tiny run is a URL"
_HEALTHY = "the tiny run is healthy: no step is bad, and no save fails"
# Fields that change no number but by the order of its sum, as some processors take it: padding has
# no part in loss or gradient, and gives the GEMM of the head another shape.
ROUNDED = {"Model.vocab_multiple"}
_ROUNDING = 1e-5  # relative: a few float32 steps in a sum of some hundred terms, twice
# Fields that change no metric and no file of the tiny run, and why.
IDLE = {
    **dict.fromkeys(numeric_owners(Evaluation), "the tiny run asks no tasks"),
    "Data.warn_epochs": "when the console says that a source is repeated",
    **dict.fromkeys(
        ("Degrees.tensor", "Degrees.pipeline", "Degrees.expert", "Degrees.expert_tensor"),
        _ONE_PROCESS,
    ),
    **dict.fromkeys(("Parallel.virtual_pipeline", "Parallel.context"), _ONE_PROCESS),
    **dict.fromkeys(
        ("Phase.tensor", "Phase.pipeline", "Phase.context", "Phase.expert"), _ONE_PROCESS
    ),
    "Checkpoint.url_patience_s": "no checkpoint of the tiny run goes behind a URL",
    "AdamW.offload_share": "where the optimizer's state lies; its steps are equal to the bit",
    "Gpu.cuda_graph_warmup_steps": "a CPU captures no CUDA graphs",
    "Gpu.dispatcher_sms": _ONE_PROCESS,
    "Parallel.bucket_parameters": _ONE_PROCESS,
    "Parallel.recompute_layers": "memory and time; what is computed again is the same",
    "Profile.ranks": _ONE_PROCESS,
    "Profile.snapshot_events": "only a GPU records allocations",
    **dict.fromkeys(
        ("Recovery.spike_sigmas", "Recovery.spike_window", "Recovery.rollback_after"), _HEALTHY
    ),
    **dict.fromkeys(("Recovery.max_rollbacks", "Recovery.max_failed_saves"), _HEALTHY),
    "Recovery.time_limit_s": "when a run stops by the clock; shorter limits than those tried do",
    "Recovery.straggler_interval": _ONE_PROCESS,
    "Recovery.checksum_interval": _ONE_PROCESS,
    "Recovery.straggler_ratio": _ONE_PROCESS,
    **dict.fromkeys(
        ("Remote.cache_bytes", "Remote.block_bytes", "Remote.read_ahead", "Remote.tries"),
        _NOTHING_REMOTE,
    ),
    "Remote.first_wait_s": _NOTHING_REMOTE,
    "Runtime.threads": "time; the tiny run is too small for a second thread",
    "Runtime.gc_interval": "when garbage is collected",
    "Runtime.peak_tflops": "the MFU, which is as much a time as a metric",
    "Runtime.timeout_s": "a collective that hangs; a healthy run has none",
    "Runtime.hang_timeout_s": "a process that hangs; a healthy run has none",
    "Tracking.console_interval": "how often the console has a line",
}


def accepted(asked: dict[Pair, str | None]) -> list[Pair]:
    """Return what trains: accepted, and not too large for a test."""
    return [one for one, said in asked.items() if said is None and not one.is_for_others]


def assert_refused_in_words(asked: dict[Pair, str | None]) -> None:
    for one, said in asked.items():
        assert said is None or "in the configuration; nothing was started" in said, one.line


def assert_trained(runs: list[Pair], outcomes: list[answers.Outcome]) -> None:
    bad = [
        f"{pair.line}: exit code {run.code}, {run.steps} steps, finite: {run.finite}\n{run.said}"
        for pair, run in zip(runs, outcomes, strict=True)
        if not run.is_sound and not run.is_refused
    ]
    assert not bad, "\n\n".join(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_field_of_a_run_takes_what_is_no_finite_number(value: float) -> None:
    job = composer("train").job(*LISTED)
    taken = []
    for one in fields_of("train"):
        section_path, _, name = one.path.rpartition(".")
        section = reduce(part, section_path.split("."), job)
        before = getattr(section, name)
        held: Any = {"text": str(value), "list": [value], "dict": {"copy": value}}
        setattr(section, name, held.get(one.shape, value))
        taken += [] if list(collect(job)) else [one.path]
        setattr(section, name, before)
    assert taken == []


def part(section: Any, name: str) -> Any:
    if isinstance(section, list):
        return section[int(name)]
    return section[name] if isinstance(section, dict) else getattr(section, name)


def test_a_sample_of_accepted_numbers_trains(tmp_path: Path) -> None:
    asked = refusals(pairs(fields_of("train"))[::SAMPLED])
    assert_refused_in_words(asked)
    runs = accepted(asked)
    assert len(runs) > 4
    assert_trained(runs, answers.train([one.lines for one in runs], tmp_path))


def test_every_numeric_field_of_every_schema_is_tried() -> None:
    known = set[str]().union(*(numeric_owners(schema) for schema in SCHEMAS.values()))
    assert {field.owner for field in every()} == known


@pytest.mark.slow
@pytest.mark.parametrize("base", sorted(set(BASES) - {"train"}))
def test_other_jobs_refuse_in_words_or_accept(base: str) -> None:
    assert_refused_in_words(refusals(pairs(one for one in every() if one.base == base)))


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_every_number_is_refused_or_trains(share: int, tmp_path: Path) -> None:
    fields = fields_of("train")[share::SHARES]
    asked = refusals(pairs(fields))
    assert_refused_in_words(asked)
    runs = accepted(asked)
    assert len(runs) > 400 / SHARES / 2, "hardly any value is accepted"
    besides = list(dict.fromkeys(field.beside for field in fields))
    outcomes = answers.train([*besides, *(one.lines for one in runs)], tmp_path)
    plain = dict(zip(besides, outcomes, strict=False))
    outcomes = outcomes[len(besides) :]
    assert_trained(runs, outcomes)
    moving = {
        one.field.owner
        for one, run in zip(runs, outcomes, strict=True)
        if not same(run, plain[one.field.beside], rounded=one.field.owner in ROUNDED)
    }
    asked_for = {field.owner for field in fields}
    assert asked_for - moving == (IDLE.keys() | ROUNDED) & asked_for


def same(run: answers.Outcome, plain: answers.Outcome, *, rounded: bool) -> bool:
    """Tell whether a run left what another did; its numbers may be rounded otherwise."""
    if not rounded:
        return run.left == plain.left
    (metrics, files), (expected, names) = run.left, plain.left
    return files == names and metrics == [pytest.approx(one, rel=_ROUNDING) for one in expected]
