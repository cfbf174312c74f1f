"""What the finished runs of a study are asked: an `evaluate` for each, and its figures over seeds.

Beside the folder of a run lie the folder of its results, their log, and once all are there a file
that says which settings they are of. The checkpoints of a run stay until then.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint.layout import FOLDER as CHECKPOINTS
from hybrid_train.config.commands import setting
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError
from hybrid_train.tracking.gaps import Spread, spread
from hybrid_train.tracking.plots import Figures

COMMAND = "evaluate"
_SMALL, _LARGE = 100, 10_000  # values between which one digit behind the point is enough


@dataclass(frozen=True)
class PlannedEvaluation:
    """What a run is asked once it has ended.

    Attributes:
        run: name of the run.
        of_run: its folder.
        settings: of `evaluate`, but what is asked and where it writes.
    """

    run: str
    of_run: Path
    settings: Sequence[str]

    @property
    def name(self) -> str:
        return f"evaluation of {self.run}"

    @property
    def job(self) -> None:
        """Nothing that others have to know of it: a run says it all."""

    @property
    def folder(self) -> Path:
        return self.of_run.with_name(f"{self.of_run.name}.evaluation")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def mark(self) -> Path:
        """The file that says that all results are there."""
        return self.folder.with_name(f"{self.folder.name}.done.json")

    @property
    def lines(self) -> list[str]:
        """All settings of the command."""
        return [*self.settings, *places(self.of_run, self.folder)]

    def is_finished(self) -> bool:
        """Tell whether the results of these very settings are there."""
        try:
            found = json.loads(self.mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        formats.STAGE.require_readable(found.get(formats.KEY), self.mark)
        return bool(found["overrides"] == list(self.settings)) and self.folder.is_dir()

    def finish(self, seconds: float) -> None:
        """Write that all results are there; a reader sees all of it or nothing."""
        record = {
            formats.KEY: formats.STAGE.stamp(),
            "command": COMMAND,
            "overrides": list(self.settings),
            "seconds": round(seconds, 1),
        }
        half = self.mark.with_suffix(".tmp")
        half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        half.replace(self.mark)

    def require_checkpoint(self) -> None:
        """Refuse a run that cannot be asked any more.

        Raises:
            UserError: with what to do.
        """
        if not (self.of_run / CHECKPOINTS).is_dir():
            raise UserError(
                f"{self.of_run}: the run has ended and its checkpoints are gone, so that it cannot "
                f"be asked what `evaluate` says now: {' '.join(self.settings)}. Remove the folder "
                "to repeat the run, or choose another run_dir=..."
            )

    def figures(self) -> Iterator["Figure"]:
        """Yield what came out, task by task; none before it has ended."""
        for path in sorted(self.folder.glob("*.json")) if self.is_finished() else ():
            found = json.loads(path.read_text(encoding="utf-8"))
            formats.EVALUATION.require_readable(found.get(formats.KEY), path)
            for one in found["figures"]:
                value = math.nan if one["value"] is None else one["value"]
                yield Figure(f"{found['task']}.{one['metric']}", one["group"], value)


@dataclass(frozen=True)
class Figure:
    """A metric of a task, over all items (no group) or those of a group."""

    metric: str  # TASK.METRIC
    group: str
    value: float


def places(run_dir: Path, folder: Path) -> list[str]:
    """Return what `evaluate` is asked to read, and where it writes."""
    return [f"checkpoint=[{run_dir}]", setting("output", folder)]


def over_seeds(evaluations: Sequence[PlannedEvaluation]) -> Figures:
    """Describe each figure over the seeds of a variant."""
    values: dict[tuple[str, str], list[float]] = {}
    for one in evaluations:
        for figure in one.figures():
            values.setdefault((figure.metric, figure.group), []).append(figure.value)
    return {key: spread(known) for key, known in values.items()}


def of_metrics(found: Figures, metrics: Sequence[str]) -> Figures:
    """Return the figures of some metrics; none named is all."""
    return {key: one for key, one in found.items() if key[0] in (metrics or [key[0]])}


def rows(variants: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    """Return a row for each figure, with a cell for each variant.

    A metric with groups is shown for each of them, not over all.

    Args:
        variants: figures by the name of the variant.
    """
    keys = dict.fromkeys(key for found in variants.values() for key in found)
    grouped = {metric for metric, group in keys if group}
    return [
        (metric, group or "-", *(_cell(found.get((metric, group))) for found in variants.values()))
        for metric, group in keys
        if bool(group) == (metric in grouped)
    ]


def as_data(found: Figures) -> dict[str, dict[str, Any]]:
    """Return figures as plain data: by metric, then by group."""
    data: dict[str, dict[str, Any]] = {}
    for (metric, group), one in found.items():
        known = {name: x if math.isfinite(x) else None for name, x in asdict(one).items()}
        data.setdefault(metric, {})[group] = known
    return data


def _cell(one: Spread | None) -> str:
    """Show a mean over seeds with its deviation."""
    if one is None or not math.isfinite(one.mean):
        return "-"
    deviation = f" \u00b1 {_shown(one.deviation, one.mean)}" if one.number > 1 else ""
    return f"{_shown(one.mean, one.mean)}{deviation}"


def _shown(value: float, beside: float) -> str:
    """Show a number with as many digits as one beside it has."""
    digits = 4 if abs(beside) < _SMALL else 1 if abs(beside) < _LARGE else 0
    return f"{value:.{digits}f}"
