"""Results of tasks: figures with intervals, a file for each, and several models side by side.

A result is known by three hashes, of checkpoint, settings and items. Models are compared item by
item, so results of other items or settings are refused; one that is there with the same hashes is
read, not computed again.
"""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid_train.data.prepare.manifest import write_whole
from hybrid_train.evaluation import heldout
from hybrid_train.evaluation.intervals import (
    Interval,
    mean_interval,
    score_difference,
    score_interval,
)
from hybrid_train.evaluation.runner import ItemResult, digest
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_log = logging.getLogger(__name__)
_LETTERS = 8  # of a hash in the name of a file
_DIGITS = {"perplexity": 2}
_USUAL_DIGITS = 4
_FEWEST = 5  # documents that a bootstrap resamples: of fewer it says nothing
HEADS = ("task", "group", "metric")


@dataclass(frozen=True)
class Checkpoint:
    """The model that was asked.

    Attributes:
        name: of run and checkpoint.
        digest: of its checksums.
        tokenizer: fingerprint.
    """

    name: str
    digest: str
    tokenizer: str


@dataclass(frozen=True)
class Figure:
    """A metric of a task, over all items or those of a group, with an interval of 95 %."""

    group: str  # empty: all items
    metric: str
    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Result:
    """What came of one measure and one checkpoint.

    Attributes:
        task: name of the measure.
        checkpoint: what was asked.
        settings: plain data that decides the result beside the items.
        items_hash: of the items.
        seed: of the intervals.
        versions: of libraries.
        items: what came of each.
    """

    task: str
    checkpoint: Checkpoint
    settings: Mapping[str, Any]
    items_hash: str
    seed: int
    versions: Mapping[str, str | None] = field(default_factory=dict)
    items: tuple[ItemResult, ...] = ()

    @property
    def hashes(self) -> dict[str, str]:
        """What it is known by."""
        return {
            "checkpoint": self.checkpoint.digest,
            "settings": digest([dict(self.settings), self.seed]),
            "items": self.items_hash,
        }

    def figures(self) -> Iterator[Figure]:
        """Yield every metric over all items, then by group."""
        for group in dict.fromkeys(("", *(one.group for one in self.items))):
            items = self.of_group(group)
            for metric in _metrics(items):
                found = self._interval(items, metric)
                yield Figure(group, metric, *_numbers(found), len(items))
                if metric == "loss":
                    value, low, high = (_exp(one) for one in _numbers(found))
                    yield Figure(group, "perplexity", value, low, high, len(items))

    def of_group(self, group: str) -> list[ItemResult]:
        """Return the items of a group; all of them if it has no name."""
        return [one for one in self.items if group in ("", one.group)]

    def _interval(self, items: Sequence[ItemResult], metric: str) -> Interval:
        having = _having(items, metric)
        totals, sizes = _columns(having, metric)
        if _are_scores(totals, sizes):
            return score_interval(totals, _documents(having))
        return _of_ratio(totals, sizes, _documents(having), self.seed)


def difference(first: Result, other: Result, group: str, metric: str) -> Interval | None:
    """Return how much higher a metric is of the second, item by item; None: it says nothing.

    Raises:
        UserError: if they are of other items or settings.
    """
    require_comparable(first, other)
    one, two = (_having(each.of_group(group), metric) for each in (first, other))
    (totals, sizes), (others, same) = _columns(one, metric), _columns(two, metric)
    if not sizes or sizes != same or not is_comparable(metric, [first, other]):
        return None
    apart = [after - before for before, after in zip(totals, others, strict=True)]
    if _are_scores([*totals, *others], sizes):
        return score_difference(apart, _documents(one))
    return _of_ratio(apart, sizes, _documents(one), first.seed)


def is_comparable(metric: str, results: Sequence[Result]) -> bool:
    """Tell whether a metric means the same for all models: what is one per token may not."""
    is_per_token = results[0].task == heldout.NAME and metric in heldout.PER_TOKEN
    return not is_per_token or len({one.checkpoint.tokenizer for one in results}) == 1


def require_comparable(first: Result, other: Result) -> None:
    """Refuse results that say nothing about each other.

    Raises:
        UserError: with what differs.
    """
    for what in ("settings", "items"):
        if first.hashes[what] != other.hashes[what]:
            raise UserError(
                f"{other.task}: {other.checkpoint.name} was asked with other {what} than "
                f"{first.checkpoint.name} ({other.hashes[what][:_LETTERS]}, not "
                f"{first.hashes[what][:_LETTERS]}); evaluate both in one command"
            )


def rows(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table of one task: each figure, for each model, and differences.

    Args:
        results: of one task, a model each.
    """
    first, *others = results
    for figures in zip(*(one.figures() for one in results), strict=True):
        one = figures[0]
        mark = "" if is_comparable(one.metric, results) else " *"
        line = [first.task, one.group or "-", one.metric + mark]
        for figure in figures:
            line += [_shown(figure.metric, figure.value), _interval_shown(figure)]
        for other in others:
            apart = difference(first, other, one.group, one.metric)
            line += ["-", "-"] if apart is None else [
                f"{apart.estimate:+.{_USUAL_DIGITS}f}", _ends(apart.low, apart.high, _USUAL_DIGITS)
            ]  # fmt: skip
        yield tuple(line)


def heads(names: Sequence[str]) -> tuple[str, ...]:
    """Return the heads of that table."""
    if len(names) == 1:
        return (*HEADS, "value", "95 % interval")
    own = [head for name in names for head in (name, "95 %")]
    apart = [head for name in names[1:] for head in (f"{name} - {names[0]}", "95 %")]
    return (*HEADS, *own, *apart)


class ResultFolder:
    """A folder with a file for each checkpoint and task, written whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Take a folder, which may be new.

        Raises:
            UserError: if it is none, or holds anything else.
        """
        self._path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"output = {path}: is a file; it must be a folder")
        strange = [one.name for one in path.glob("*") if one.suffix not in (".json", ".new")]
        if strange:
            raise UserError(
                f"output = {path}: holds {strange[0]}, which is no result; choose another folder"
            )

    def open(self, wanted: Sequence[Result]) -> list[Result | None]:
        """Make the folder, before anything is measured, and read what is there of some results.

        Raises:
            UserError: as of `read`, or if nothing can be written there.
        """
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._path):
                pass
        except OSError as error:
            raise UserError(
                f"output = {self._path}: cannot be written to ({error.strerror}); choose another"
            ) from error
        return [self.read(one) for one in wanted]

    def read(self, wanted: Result) -> Result | None:
        """Return the result with the hashes of this one; None: it is not there yet.

        Raises:
            UserError: if a result of the same checkpoint and task has other hashes, or is damaged.
        """
        path = self._file(wanted)
        if not path.is_file():
            return None
        found = _read(path)
        for what, mine in wanted.hashes.items():
            if found.hashes[what] != mine:
                raise UserError(
                    f"output = {path.parent}: {path.name} was made with other {what}; choose "
                    "another output, or remove the file"
                )
        _log.info("%s of %s is read from %s", wanted.task, wanted.checkpoint.name, path)
        return found

    def write(self, result: Result) -> None:
        """Write the file of a result.

        Raises:
            UserError: if it cannot be written.
        """
        path = self._file(result)
        content = {
            formats.KEY: formats.EVALUATION.stamp(),
            **{key: value for key, value in asdict(result).items() if key != "items"},
            "hashes": result.hashes,
            "figures": [_finite(asdict(one)) for one in result.figures()],
            "items": [asdict(one) for one in result.items],
        }
        try:
            write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; make room") from error
        _log.info("wrote %s: %s", path, counted(len(result.items), "item"))

    def _file(self, result: Result) -> Path:
        name = result.checkpoint.name.replace("/", "-")
        return self._path / f"{name}-{result.checkpoint.digest[:_LETTERS]}-{result.task}.json"


def _read(path: Path) -> Result:
    """Read the file of a result.

    Raises:
        UserError: if it is damaged, or of another format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        formats.EVALUATION.require_readable(found[formats.KEY], path)
        items = tuple(
            ItemResult(**{**one, "values": {key: tuple(two) for key, two in one["values"].items()}})
            for one in found["items"]
        )
        names = ("task", "settings", "items_hash", "seed", "versions")
        kept = {name: found[name] for name in names}
        result = Result(checkpoint=Checkpoint(**found["checkpoint"]), items=items, **kept)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, or choose another output"
        ) from error
    if result.hashes != found["hashes"]:
        raise UserError(f"{path} is damaged: its hashes are not those of its content; remove it")
    return result


def _metrics(items: Sequence[ItemResult]) -> list[str]:
    """Return the metrics of items that anything adds up to, in their order."""
    names = dict.fromkeys(name for one in items for name in one.values)
    return [name for name in names if _having(items, name)]


def _having(items: Sequence[ItemResult], metric: str) -> list[ItemResult]:
    """Return the items that a metric says anything of: an empty text has no bits per byte."""
    return [one for one in items if one.values.get(metric, (0.0, 0.0))[1] > 0]


def _columns(items: Sequence[ItemResult], metric: str) -> tuple[list[float], list[float]]:
    pairs = [one.values[metric] for one in items]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _of_ratio(
    totals: Sequence[float], sizes: Sequence[float], documents: list[str] | None, seed: int
) -> Interval:
    """Return the interval of a ratio; without ends where there are too few items to resample."""
    if len(set(documents) if documents else totals) < _FEWEST:
        return Interval(math.fsum(totals) / math.fsum(sizes), -math.inf, math.inf)
    return mean_interval(totals, sizes, documents, seed=seed)


def _are_scores(totals: Sequence[float], sizes: Sequence[float]) -> bool:
    """Tell whether each item has one grade, from 0 to 1; documents have sums."""
    return all(one == 1 for one in sizes) and all(0 <= one <= 1 for one in totals)


def _documents(items: Sequence[ItemResult]) -> list[str] | None:
    """Return the document of each item; None: each item is one of its own."""
    if not any(one.document for one in items):
        return None
    return [one.document or one.name for one in items]


def _ratio(items: Sequence[ItemResult], metric: str) -> float:
    totals, sizes = _columns(_having(items, metric), metric)
    return math.fsum(totals) / math.fsum(sizes)


def _numbers(interval: Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


def overall(items: Sequence[ItemResult]) -> dict[str, float]:
    """Return the metrics over all items, without intervals."""
    found = {metric: _ratio(items, metric) for metric in _metrics(items)}
    return found | ({"perplexity": _exp(found["loss"])} if "loss" in found else {})


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # noqa: PLR2004  of a float64


def _finite(figure: dict[str, Any]) -> dict[str, Any]:
    """Write what is no number as null, which JSON has."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in figure.items()
    }


def _shown(metric: str, value: float) -> str:
    return f"{value:.{_DIGITS.get(metric, _USUAL_DIGITS)}f}"


def _interval_shown(figure: Figure) -> str:
    return _ends(figure.low, figure.high, _DIGITS.get(figure.metric, _USUAL_DIGITS))


def _ends(low: float, high: float, digits: int) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "-"  # too few items say nothing of it
    return f"{low:.{digits}f} to {high:.{digits}f}"
