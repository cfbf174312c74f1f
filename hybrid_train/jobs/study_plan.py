"""The runs of a study: composed and checked before any of them starts, and what is done already."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_train.config import compose, frozen
from hybrid_train.config.check_files import run_dir_can_be_a_folder
from hybrid_train.config.command_text import setting
from hybrid_train.config.launcher import require_alone
from hybrid_train.jobs.run_folder import differences, is_untrained
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.study import StudyJob
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics

# What changes no loss, or is the study's own; any other difference makes it another run. Unlike a
# run that goes on, a run of a study may not become longer: its schedule would be that of neither.
_MAY_DIFFER = ("run_dir", "runtime.", "tracking.", "checkpoint.", "data.cache", "data.remote.")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        variant: its name.
        seed: of data and weights.
        lines: overrides of `hybrid-train train`.
        job: what they compose to.
    """

    variant: str
    seed: int
    lines: Sequence[str]
    job: TrainJob

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.job.run_dir)

    @property
    def log(self) -> Path:
        """Beside the run folder, which holds nothing else before the run has claimed it."""
        return self.folder.with_suffix(".log")

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of the run so far."""
        path = self.folder / FILE_NAME
        return read_metrics(path) if path.is_file() else []

    def is_finished(self) -> bool:
        """Tell whether the metrics reach the end of the run."""
        lines = self.metrics()
        return bool(lines) and lines[-1]["tokens"] >= tokens(self.job.train.tokens)


def plan(study: StudyJob) -> list[PlannedRun]:
    """Compose every run; seed after seed, so that a study that is stopped has whole seeds.

    Raises:
        ConfigError: if any variant cannot run, with every problem of every variant.
        UserError: if a run folder holds a run with other settings.
    """
    require_alone("study")
    runs: list[PlannedRun] = []
    found: dict[str, list[Problem]] = {}
    for name, variant in study.chosen().items():
        try:
            lines = [*study.base, *variant.overrides, *study.overrides]
            job = compose.compose("train", lines)
            runs += [_of_seed(study.run_dir, name, seed, lines, job) for seed in study.seeds]
        except ConfigError as error:
            found[name] = list(error.problems)
    outside = list(_folder_problems(study, runs))
    if found or outside:
        raise ConfigError([*_by_variant(found, len(study.chosen())), *outside])
    runs.sort(key=lambda run: study.seeds.index(run.seed))  # stable: variants stay in their order
    _require_same_runs(runs)
    return runs


def _folder_problems(study: StudyJob, runs: Sequence[PlannedRun]) -> Iterator[Problem]:
    """Yield why the study, or a run of it, cannot have its folder."""
    if (Path(study.run_dir) / frozen.FROZEN_NAME).is_file():
        yield Problem("run_dir", study.run_dir, "is the folder of a run; a study needs its own")
    for run in runs:
        if problem := next(run_dir_can_be_a_folder(run.job), None):
            yield problem
            return  # it is the same for all, or for all of a variant
        if not run.folder.is_dir() or not any(run.folder.iterdir()) or is_untrained(run.folder):
            continue
        if not (run.folder / frozen.FROZEN_NAME).is_file():
            rule = f"is not empty and no run folder: it has no {frozen.FROZEN_NAME}"
            yield Problem("run_dir", str(run.folder), rule)


def _of_seed(
    run_dir: str, variant: str, seed: int, lines: Sequence[str], composed: TrainJob
) -> PlannedRun:
    """Give the job of a variant a seed and a folder, without composing it again."""
    job = copy.deepcopy(composed)
    job.train.seed, job.run_dir = seed, f"{run_dir}/{variant}/seed_{seed}"
    own = [f"train.seed={seed}", setting("run_dir", job.run_dir)]
    return PlannedRun(variant, seed, [*lines, *own], job)


def are_paired(one: TrainJob, other: TrainJob) -> bool:
    """Tell whether two runs with one seed start from the same weights and read the same batches."""
    return one.model == other.model and _batches(one) == _batches(other)


def _batches(job: TrainJob) -> tuple[Any, ...]:
    """Return what the rows of every step follow from; each phase has an order of its own."""
    stretches = lay_out(job)
    trains = [stretch.job.train for stretch in stretches]
    sizes = [(train.sequence_length, train.global_batch, train.batch_ramp) for train in trains]
    ends = [(stretch.start, stretch.end) for stretch in stretches]
    return ends, sizes, [stretch.job.data for stretch in stretches]


def _by_variant(found: Mapping[str, Sequence[Problem]], variants: int) -> Iterator[Problem]:
    """Name the variant of each problem; one that all have is reported once, of the base."""
    lists = list(found.values()) or [[]]
    shared = [one for one in lists[0] if all(one in each for each in lists)]
    if len(lists) < variants or variants == 1:
        shared = []
    for problem in shared:
        yield replace(problem, path=f"every variant: {problem.path}")
    for name, problems in found.items():
        for problem in problems:
            if problem not in shared:
                yield replace(problem, path=f"{name}: {problem.path}")


def _require_same_runs(runs: Sequence[PlannedRun]) -> None:
    """Refuse folders whose runs were made with other settings."""
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if (run.folder / frozen.FROZEN_NAME).is_file() and not is_untrained(run.folder):
            for key, old, new in differences(frozen.load(run.folder), run.job):
                if not key.startswith(_MAY_DIFFER):
                    found.setdefault(f"{key}: {old} there, {new} here", []).append(run)
    if found:
        text = "\n".join(
            f"  {change} ({', '.join(run.name for run in those)})"
            for change, those in found.items()
        )
        raise UserError(
            "runs of this study were made with other settings; nothing was started:\n"
            f"{text}\nChoose another run_dir=..., or remove these runs to repeat them"
        )
