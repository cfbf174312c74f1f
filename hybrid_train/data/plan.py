"""Which rows every phase and validation draws from every source: the order of a run's data.

Nothing of it is random at run time and nothing has to be saved: the same config, data and seed give
the same rows in every process, and a position in tokens says which of them are done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Joined, Span
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.order import BlendOrder, Indices
from hybrid_train.data.packing import PackedPosition, PackedRows, Packing
from hybrid_train.data.stream import Stream, StreamPosition, StreamRows
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.schema.data import Data
from hybrid_train.schema.data import Packing as PackingMode
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import Train
from hybrid_train.schema.units import show_tokens

_BLOCK = 1024  # rows that are looked up at once

Fields = dict[str, NDArray[Any]]  # a row, by the name of a field of `Batch`
SourceRows = StreamRows | PackedRows
Position = StreamPosition | PackedPosition
# Validation has the same order in every run, so that runs with other seeds can be compared.
_VALIDATION_SEED = 0


class Rows(Protocol):
    """The rows of one source in one phase; see `stream.StreamRows`, `packing.PackedRows`."""

    def prepare(self, rows: int) -> None:
        """Build what the first `rows` rows need and is worth keeping on disk."""

    def spans(self, row: int) -> list[Span]:
        """Return the spans of documents in a row."""

    def fill(self, row: int) -> Fields:
        """Return the fields of a row by name, each [L]."""


@dataclass(frozen=True)
class RowOrigin:
    """Where a row of a phase comes from."""

    source: int  # place among those that are mixed
    row: int  # of that source in this phase


class Mixture:
    """Rows of several sources in the order of a phase; row 0 is the first of the phase."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Mix by weights; `open` says what is mixed."""
        self._sources: Sequence[Rows] = ()
        self._numbers: Sequence[int] = ()
        self._order = BlendOrder(weights, seed)
        self._block = lru_cache(maxsize=2)(self._look_up)

    def open(self, sources: Sequence[Rows], numbers: Sequence[int]) -> None:
        """Take the rows of each source, and the number of each among those of the run."""
        self._sources = sources
        self._numbers = numbers

    def counts(self, rows: int) -> Indices:
        """Return how many of the first `rows` rows are from each source, [sources]."""
        return self._order.counts(rows)

    def origin(self, row: int) -> RowOrigin:
        """Say where a row comes from."""
        sources, rows = self._block(row // _BLOCK)
        return RowOrigin(int(sources[row % _BLOCK]), int(rows[row % _BLOCK]))

    def spans(self, row: int) -> list[Span]:
        """Return the spans of documents in a row."""
        origin = self.origin(row)
        return self._sources[origin.source].spans(origin.row)

    def fill(self, row: int) -> Fields:
        """Return the fields of a row, each [L], and `source`, its number, []."""
        origin = self.origin(row)
        fields = self._sources[origin.source].fill(origin.row)
        return {**fields, "source": np.asarray(self._numbers[origin.source])}

    def _look_up(self, block: int) -> tuple[Indices, Indices]:
        first = block * _BLOCK
        sources = self._order.sources(first, first + _BLOCK)
        before = self._order.counts(first)
        rows = np.empty_like(sources)
        for number in np.unique(sources):
            found = np.flatnonzero(sources == number)
            rows[found] = before[number] + np.arange(len(found))
        return sources, rows


@dataclass(frozen=True)
class Draw:
    """What a phase takes from a source.

    Attributes:
        source: its name.
        share: of the rows of the phase.
        rows: how many that are.
        epochs: passes through the source since the start of the run, at the end of the phase.
    """

    source: str
    share: float
    rows: int
    epochs: float


@dataclass(frozen=True)
class PhasePlan:
    """The rows of one phase."""

    phase_span: PhaseSpan
    mixture: Mixture
    rows: list[SourceRows]
    draws: list[Draw]

    def prepare(self) -> None:
        """Build the large indices that the phase needs, into the cache."""
        for rows, draw in zip(self.rows, self.draws, strict=True):
            rows.prepare(draw.rows)


@dataclass(frozen=True)
class OpenSources:
    """The sources of a run.

    Attributes:
        documents: of each source with tokens for the split, by name.
        longest: inputs of the longest packed span of a source, where that is limited.
        padding: token that fills up packed rows.
        cache: where large indices are kept.
    """

    documents: Mapping[str, Joined]
    longest: Mapping[str, int]
    padding: int
    cache: IndexCache


def plan_phases(
    phase_spans: list[PhaseSpan], opened: OpenSources, names: Sequence[str]
) -> list[PhasePlan]:
    """Work out the rows of all phases.

    Args:
        phase_spans: the phases.
        opened: the sources of the train split.
        names: of all sources of the run, in the order of their numbers.
    """
    places: dict[str, Position] = {}
    plans = []
    for phase_span in phase_spans:
        job = phase_span.job
        weights = weights_of(job.data.blend, opened)
        mixture = Mixture(list(weights.values()), seed=job.train.seed + phase_span.number)
        counts = mixture.counts(phase_span.length.sequences).tolist()
        rows: list[SourceRows] = []
        draws = []
        for (name, weight), count in zip(weights.items(), counts, strict=True):
            found = open_rows(name, opened, job.data.packing, job.train, begin=places.get(name))
            places[name] = found.end(count)
            rows.append(found)
            draws.append(Draw(name, weight / sum(weights.values()), count, found.epochs(count)))
        mixture.open(rows, [names.index(name) for name in weights])
        plans.append(PhasePlan(phase_span, mixture, rows, draws))
    return plans


def open_rows(
    name: str,
    opened: OpenSources,
    packing: PackingMode,
    train: Train,
    *,
    begin: Position | None = None,
    seed: int | None = None,
) -> SourceRows:
    """Cut or pack the rows of one source.

    Args:
        name: of the source.
        opened: the sources.
        packing: whether and how whole documents share a row.
        train: length of a row in the phase, and the seed.
        begin: where a phase before ended; None for the beginning.
        seed: of the shuffle; None for that of the run.
    """
    documents, length = opened.documents[name], train.sequence_length
    key = (train.seed if seed is None else seed, name)
    if packing is PackingMode.none:
        stream = Stream(documents, key=key, cache=opened.cache)
        return StreamRows(
            stream, length=length, begin=cast("StreamPosition", begin or StreamPosition())
        )
    limits = Packing(length, min(length, opened.longest.get(name, length)), opened.padding)
    place = cast("PackedPosition", begin or PackedPosition())
    return PackedRows(documents, limits, key=key, cache=opened.cache, begin=place)


def weights_of(blend: Mapping[str, float], opened: OpenSources) -> dict[str, float]:
    """Return the weight of every source, in the order of the sources; by size without a blend."""
    if not blend:
        return {name: float(one.tokens) for name, one in opened.documents.items()}
    return {name: blend.get(name, 0.0) for name in opened.documents}


def describe_phases(
    plans: list[PhasePlan], opened: OpenSources, warn: float, say: Callable[[str], None]
) -> Iterator[str]:
    """Yield the table of sources and phases; `say` is told of sources that are repeated often."""
    for plan in plans:
        phase_span = plan.phase_span
        name = f"phase {phase_span.name}: " if phase_span.name else ""
        length = phase_span.job.train.sequence_length
        yield (
            f"{name}{show_tokens(phase_span.end - phase_span.start)} tokens, "
            f"{phase_span.length.sequences:,} rows of {length:,}"
        )
        yield f"  {'source':<24} {'tokens':>8} {'share':>7} {'rows':>13} {'epochs so far':>14}"
        for draw in plan.draws:
            size = show_tokens(opened.documents[draw.source].tokens)
            yield (
                f"  {draw.source:<24} {size:>8} {draw.share:>7.2%} {draw.rows:>13,} "
                f"{draw.epochs:>14.2f}"
            )
    last = {draw.source: draw.epochs for plan in plans for draw in plan.draws}
    for source, epochs in last.items():
        if epochs > warn:
            say(
                f"source {source} will be repeated {epochs:.1f} times, more than "
                f"data.warn_epochs={warn:g}; lower its weight, shorten the run or add data"
            )


@dataclass(frozen=True)
class ValidationSet:
    """What a validation reads of one source."""

    source: int  # its number in a batch
    rows: Rows
    used: int
    wanted: int


class HeldOut:
    """Rows of several sets, numbered through."""

    def __init__(self, sets: Sequence[ValidationSet]) -> None:
        self.sets = sets
        self._firsts = np.cumsum([0, *(one.used for one in sets)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def fill(self, row: int) -> Fields:
        """Return the fields of a row; see `Mixture.fill`."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        fields = self.sets[number].rows.fill(row - int(self._firsts[number]))
        return {**fields, "source": np.asarray(self.sets[number].source)}


def hold_out(data: Data, train: Train, opened: OpenSources, names: Sequence[str]) -> HeldOut:
    """Open the validation of a phase.

    Args:
        data: the section of the run.
        train: the same, as it is in the phase.
        opened: the sources of the validation split.
        names: of all sources of the run, in the order of their numbers.

    Raises:
        UserError: if a source is too short for a row.
    """
    weights = weights_of(data.validation_blend, opened)
    total = train.validation_batches * train.global_batch
    sets = []
    for name, weight in weights.items():
        if not weight:
            continue
        rows = open_rows(name, opened, data.packing, train, seed=_VALIDATION_SEED)
        there = rows.first_epoch()
        if there < 1:
            raise UserError(
                f"the validation part of {opened.documents[name].name} holds "
                f"{opened.documents[name].tokens} tokens, too few for one sequence of "
                f"{train.sequence_length} and its last label; shorten train.sequence_length "
                "or leave it out"
            )
        wanted = max(1, round(total * weight / sum(weights.values())))
        sets.append(ValidationSet(names.index(name), rows, min(there, wanted), wanted))
    return HeldOut(sets)
