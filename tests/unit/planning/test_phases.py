"""Phases are laid out in whole steps, and what cannot be laid out is named."""

from typing import Any

import pytest

from hybrid_train.config.checks import check
from hybrid_train.planning.phases import (
    global_batch,
    lay_out,
    phase_at,
    rows_of_step,
    unread_sources,
    validation_interval,
)
from hybrid_train.schema.data import (
    Data,
    Packing,
    Quickstart,
    Source,
    SumStream,
)
from hybrid_train.schema.optimizer import Schedule, Wsd
from hybrid_train.schema.precision import GemmFormat, Precision, PrecisionRule
from hybrid_train.schema.problems import Problem, collect
from hybrid_train.schema.train import BatchRamp, Phase, TrainJob
from tests.tiny import tiny_job

LONG = {"sequence_length": 64, "global_batch": 1}


def job(*phases: Phase, tokens: str = "6400", **train: Any) -> TrainJob:
    """A run of 64 tokens a step, with sources a and b."""
    found = tiny_job()
    found.train.tokens = tokens
    found.train.phases = list(phases)
    for name, value in train.items():
        setattr(found.train, name, value)
    found.data = Data(sources={name: Source(sums=SumStream()) for name in "ab"})
    found.model.vocab_size = 61
    return found


def problems(found: TrainJob, processes: int = 1) -> dict[str, Problem]:
    return {one.path: one for one in (*collect(found), *check(found, processes))}


def test_a_run_without_phases_is_one_phase() -> None:
    (only,) = lay_out(job(tokens="6401"))
    assert (only.start, only.end, only.length.steps) == (0, 101 * 64, 101)
    assert only.rate_tokens == 6401


def test_a_phase_ends_at_the_first_step_that_reaches_the_next_one() -> None:
    # 33% of 6400 is 2112, which is 33 steps; 2113 needs one more.
    for start, steps in (("33%", 33), ("2112", 33), ("2113", 34)):
        first, second = lay_out(job(Phase(name="one"), Phase(name="two", start=start)))
        assert (first.length.steps, second.start) == (steps, steps * 64)
        assert second.end == 6400


BF16 = PrecisionRule(format=GemmFormat.bf16)


def healed(*rules: PrecisionRule) -> TrainJob:
    """A run in NVFP4 with an exception for its attention, whose second phase has its own."""
    found = job(Phase(name="one"), Phase(name="two", start="50%", precision_exceptions=[*rules]))
    attention = PrecisionRule(format=GemmFormat.bf16, modules=["attention"])
    found.precision = Precision(format=GemmFormat.nvfp4, exceptions=[attention])
    return found


def test_exceptions_of_a_phase_may_leave_those_of_the_run_nothing_to_decide() -> None:
    assert problems(healed(BF16)) == {}


def test_an_exception_of_a_phase_that_decides_nothing_is_named_with_its_phase() -> None:
    (problem,) = problems(healed(BF16, PrecisionRule(format=GemmFormat.mxfp8))).values()
    assert problem.path == "train.phases.1.precision_exceptions.1"
    assert "decides nothing" in problem.rule


def test_a_phase_may_keep_no_weight_in_fp8_any_more() -> None:
    found = healed(BF16)
    found.precision = Precision(format=GemmFormat.fp8_tensorwise, fp8_param_gather=True)
    assert problems(found) == {}


def test_what_a_phase_leaves_out_is_as_in_the_one_before() -> None:
    phases = (
        Phase(name="one", blend={"a": 1.0}),
        Phase(name="two", start="50%", constant_lr=1e-5, context=2, **LONG),
        Phase(name="three", start="75%", blend={"b": 1.0}),
    )
    one, two, three = (phase_span.job for phase_span in lay_out(job(*phases)))
    assert [found.data.blend for found in (one, two, three)] == [{"a": 1}, {"a": 1}, {"b": 1}]
    assert [found.train.sequence_length for found in (one, two, three)] == [16, 64, 64]
    assert [found.parallel.context for found in (one, two, three)] == [1, 2, 2]
    assert [found.schedule.peak_lr for found in (one, two, three)] == [1e-3, 1e-5, 1e-3]


def test_the_schedule_stands_still_in_phases_with_a_rate_of_their_own() -> None:
    phases = (
        Phase(name="one"),
        Phase(name="pause", start="1600", constant_lr=1e-5),
        Phase(name="two", start="3200"),
        Phase(name="long", start="4800", constant_lr=1e-6),
    )
    found = lay_out(job(*phases))
    assert [phase_span.rate_start for phase_span in found] == [0, 1600, 1600, 3200]
    assert {phase_span.rate_tokens for phase_span in found} == {3200}


def test_steps_have_the_rows_that_follow_each_other() -> None:
    found = lay_out(job(Phase(name="one"), Phase(name="two", start="50%", **LONG)))
    assert rows_of_step(found, 1) == (found[0], 0, 4)
    assert rows_of_step(found, 50) == (found[0], 196, 200)
    assert rows_of_step(found, 51) == (found[1], 0, 1)
    assert rows_of_step(found, 100) == (found[1], 49, 50)
    assert rows_of_step(found, 101) is None
    assert rows_of_step(found, 0) is None


def test_steps_of_a_batch_that_grows_have_the_rows_that_follow_each_other() -> None:
    ramp = BatchRamp(tokens="640", start_batch=2, increment=1)
    found = lay_out(job(batch_ramp=ramp))
    row = 0
    for step in range(1, found[0].length.steps + 1):
        batch = global_batch(found[0].job.train, row * 16)
        assert rows_of_step(found, step) == (found[0], row, row + batch)
        row += batch
    assert row == found[0].length.sequences


def test_a_position_says_the_phase_and_the_rows_that_are_done() -> None:
    found = lay_out(job(Phase(name="one"), Phase(name="two", start="50%", **LONG)))
    assert phase_at(found, 3199) is found[0]
    assert phase_at(found, 3200) is found[1]
    assert phase_at(found, 10**6) is found[1]
    assert found[1].sequences_before(3200 + 3 * 64) == 3


@pytest.mark.parametrize("steps", [5, 9, 17, 100, 799])
def test_a_short_run_is_validated_five_to_ten_times(steps: int) -> None:
    interval = validation_interval(None, lay_out(job(tokens=str(steps * 64))))
    validations = {*range(interval, steps + 1, interval), steps}
    assert 5 <= len(validations) <= 10


def test_a_long_run_is_validated_every_hundred_steps_unless_it_asks_for_another_interval() -> None:
    assert validation_interval(None, lay_out(job(tokens=str(5000 * 64)))) == 100
    for asked in (0, 7):
        assert validation_interval(asked, lay_out(job())) == asked


def test_a_longer_run_leaves_the_phases_before_the_last_as_they_are() -> None:
    phases = (Phase(name="one"), Phase(name="two", start="3200", **LONG))
    short, long = lay_out(job(*phases)), lay_out(job(*phases, tokens="12800"))
    assert [(a.start, a.job) for a in short[:1]] == [(b.start, b.job) for b in long[:1]] or (
        short[0].end == long[0].end
    )
    assert short[1].start == long[1].start
    assert long[1].end == 12800


@pytest.mark.parametrize(
    ("phases", "path", "words"),
    [
        ([Phase(name="a", start="10%")], "train.phases.0.start", "must be 0"),
        (
            [Phase(name="a"), Phase(name="b", start="60%"), Phase(name="c", start="50%")],
            "train.phases.2.start",
            "must lie after the start of the phase before",
        ),
        ([Phase(name="a"), Phase(name="b", start="100%")], "train.phases.1.start", "before"),
        ([Phase(name="a"), Phase(name="b", start="soon")], "train.phases.1.start", "share"),
        ([Phase(name="a"), Phase(name="a", start="50%")], "train.phases.1.name", "earlier"),
        ([Phase(name="a", blend={"c": 1.0})], "train.phases.0.blend.c", "is no source"),
        ([Phase(name="a", blend={"a": -1.0, "b": 1.0})], "train.phases.0.blend.a", "at least 0"),
        ([Phase(name="a", blend={"a": 0.0})], "train.phases.0.blend", "above 0"),
        (
            [Phase(name="a"), Phase(name="b", start="50%", global_batch=3)],
            "train.phases.1.global_batch",
            "microbatch",
        ),
        (
            [
                Phase(name="a"),
                Phase(name="b", start="20%", sequence_length=63, global_batch=2),
                Phase(name="c", start="50%", context=2),
            ],
            "train.phases.1.sequence_length",
            "multiple of 4",
        ),
    ],
)
def test_what_is_wrong_with_a_phase_is_named_where_it_stands(
    phases: list[Phase], path: str, words: str
) -> None:
    found = problems(job(*phases), processes=2)
    assert words in found[path].rule


def test_phases_that_run_have_no_problems() -> None:
    assert problems(job(Phase(name="a", blend={"a": 1.0}), Phase(name="b", start="50%"))) == {}


def test_a_schedule_must_fit_into_the_phases_that_follow_it() -> None:
    found = job(Phase(name="a"), Phase(name="b", start="50%", constant_lr=1e-5))
    found.schedule = Wsd(peak_lr=1e-3, decay_tokens="3300")
    (problem,) = problems(found).values()
    assert problem.path == "schedule.decay_tokens"
    assert problem.nearest == "3200"
    found.schedule = Schedule(peak_lr=1e-3)
    assert problems(found) == {}


def test_a_batch_must_have_grown_before_the_second_phase() -> None:
    ramp = BatchRamp(tokens="3201", start_batch=2, increment=2)
    found = problems(job(Phase(name="a"), Phase(name="b", start="50%"), batch_ramp=ramp))
    assert found["train.batch_ramp.tokens"].nearest == "3200"


def test_files_stand_in_one_place_and_only_packed_documents_are_cut() -> None:
    found = job()
    found.data = Data(
        train=["x"], sources={"a": Source(sums=SumStream(), longest=8)}, tokenizer="there"
    )
    paths = problems(found)
    assert "data.train" in paths
    assert "needs data.packing=best_fit" in paths["data.sources.a.longest"].rule
    found.data.packing = Packing.best_fit
    assert "data.sources.a.longest" not in problems(found)


@pytest.mark.parametrize("data", [Data(train=["x"]), Quickstart(folder="there")])
def test_a_run_without_sources_leaves_the_blends_of_its_phases_out(data: Data) -> None:
    found = job(
        Phase(name="one", blend={"a": 0.5, "c": 0.5}),
        Phase(name="two", start="50%", blend={"b": 1.0}, global_batch=8),
    )
    assert (
        unread_sources(found.data, found.train.phases) == []
    )  # it has sources, and c is a problem
    assert "train.phases.0.blend.c" in problems(found)
    found.data = data
    assert not any("blend" in path for path in problems(found))
    assert unread_sources(found.data, found.train.phases) == ["a", "c", "b"]
    one, two = (phase_span.job for phase_span in lay_out(found))
    assert one.data.blend == two.data.blend == {}
    assert two.train.global_batch == 8  # all else stays


def test_a_blend_of_the_run_itself_needs_sources() -> None:
    found = job(Phase(name="one", blend={"a": 1.0}))
    found.data = Data(train=["x"], blend={"a": 1.0})
    assert "is no source" in problems(found)["data.blend.a"].rule
