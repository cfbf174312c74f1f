"""The rows of all phases of a run: shares kept, nothing read twice, a longer run the same."""

from collections import Counter

import numpy as np
import pytest

from hybrid_train.data.documents import Joined, Span
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.plan import OpenSources, PhasePlan, describe_phases, plan_phases
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.data import Data, Packing, Source
from hybrid_train.schema.train import Phase, Train, TrainJob
from tests.unit.data.documents import listed, random_lengths

SOURCES = {
    "a": listed(*random_lengths(300, 60, seed=1), name="a"),
    "b": listed(*random_lengths(200, 40, seed=2), name="b"),
}
PHASES = (
    Phase(name="one", blend={"a": 0.7, "b": 0.3}),
    Phase(name="two", start="60%", blend={"a": 0.2, "b": 0.8}, sequence_length=24, global_batch=2),
)


def opened(sources: dict[str, Joined] = SOURCES) -> OpenSources:
    return OpenSources(sources, {}, padding=0, cache=IndexCache(None))


def plans(
    *phases: Phase, tokens: str = "6k", packing: Packing = Packing.none, blend: object = None
) -> list[PhasePlan]:
    train = Train(tokens=tokens, sequence_length=16, microbatch=1, global_batch=3)
    train.phases = list(phases)
    sources = {name: Source(train=[name]) for name in SOURCES}
    job = TrainJob(train=train, data=Data(sources=sources, packing=packing, blend=blend or {}))
    return plan_phases(lay_out(job), opened(), ["a", "b"])


def rows(plan: PhasePlan) -> list[tuple[str, list[Span]]]:
    return [
        (plan.draws[plan.mixture.origin(row).source].source, plan.mixture.spans(row))
        for row in range(plan.phase_span.length.sequences)
    ]


def labels(found: list[PhasePlan], name: str) -> Counter[tuple[int, int]]:
    """How often each token of a source is a label."""
    return Counter(
        (span.document, t)
        for plan in found
        for source, spans in rows(plan)
        if source == name
        for span in spans
        for t in range(span.start, span.stop)
    )


def test_sources_without_weights_are_drawn_by_size() -> None:
    (plan,) = plans()
    share = SOURCES["a"].tokens / (SOURCES["a"].tokens + SOURCES["b"].tokens)
    assert plan.draws[0].share == pytest.approx(share)
    drawn = [source for source, _ in rows(plan)].count("a")
    assert drawn == plan.draws[0].rows
    assert abs(drawn - share * plan.phase_span.length.sequences) < 3


def test_phases_have_their_shares() -> None:
    for plan, share in zip(plans(*PHASES), (0.7, 0.2), strict=True):
        drawn = [source for source, _ in rows(plan)].count("a")
        assert abs(drawn - share * plan.phase_span.length.sequences) < 3


@pytest.mark.parametrize("packing", Packing)
def test_no_token_is_a_label_twice_before_the_source_is_used_up(packing: Packing) -> None:
    found = plans(*PHASES, packing=packing)
    for name, draw in zip("ab", found[-1].draws, strict=True):
        counts = labels(found, name)
        # A row ends with the token with which the next one begins: once as label, once as input.
        starts = sum(len(spans) for plan in found for source, spans in rows(plan))
        most = int(np.ceil(draw.epochs))
        repeated = sum(count > most for count in counts.values())
        assert draw.epochs < 2
        assert repeated <= starts


@pytest.mark.parametrize("packing", Packing)
def test_a_longer_run_reads_the_same_rows_first(packing: Packing) -> None:
    phases = (PHASES[0], Phase(**{**vars(PHASES[1]), "start": "3600"}))
    short, long = (plans(*phases, tokens=tokens, packing=packing) for tokens in ("6k", "20k"))
    for before, after in zip(short, long, strict=True):
        assert rows(after)[: len(rows(before))] == rows(before)


@pytest.mark.parametrize("packing", Packing)
def test_a_phase_that_is_added_leaves_the_rows_before_it_as_they_are(packing: Packing) -> None:
    blend = {"a": 0.7, "b": 0.3}
    (alone,) = plans(packing=packing, blend=blend)
    first, _ = plans(Phase(name="one"), PHASES[1], packing=packing, blend=blend)
    assert rows(alone)[: len(rows(first))] == rows(first)


def test_epochs_add_up_over_the_phases() -> None:
    found = plans(*PHASES)
    for number, name in enumerate("ab"):
        tokens = sum(
            plan.draws[number].rows * plan.phase_span.job.train.sequence_length for plan in found
        )
        epochs = found[-1].draws[number].epochs
        assert epochs == pytest.approx(tokens / SOURCES[name].tokens, abs=0.01)


def test_the_table_names_sources_and_warns_of_those_repeated_often() -> None:
    said: list[str] = []
    lines = list(describe_phases(plans(*PHASES, tokens="60k"), opened(), 4.0, said.append))
    assert lines[0].startswith("phase one: 36k tokens, 2,250 rows of 16")
    assert any("a " in line and "70.00%" in line for line in lines)
    (warning,) = said
    assert "source b will be repeated 7." in warning
