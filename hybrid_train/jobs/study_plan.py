"""The plan of a study: its stages and runs, and the learning rate of each kind of run.

A rate is chosen by trials, for each objective, and apart for runs that begin with trained weights,
which want smaller steps; or for each variant. The first variant of a kind trains with every
candidate, each on the same share of the tokens and with a seed that is not reported; the lowest
loss wins. Trials are stages like others: equal ones run once for all studies. What was chosen is
written into the folder of the study, which keeps to it.
"""

import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid_train.config import compose, frozen
from hybrid_train.config.commands import setting
from hybrid_train.config.launcher import require_alone
from hybrid_train.config.rules_of_data import what_forbids
from hybrid_train.jobs.run_folder import differences, is_untrained
from hybrid_train.jobs.study_evaluation import PlannedEvaluation
from hybrid_train.jobs.study_stages import PlannedStage, Stages
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema import formats
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.study import RATES_FILE, StudyJob
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.tracking.gaps import TAIL, WINDOWS, curve
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import show

RATE_KEY = "schedule.peak_lr"
# What changes no loss, or is the study's own; any other difference makes it another run. Unlike a
# run that goes on, a run of a study may not become longer: its schedule would be that of neither.
_MAY_DIFFER = (
    *("run_dir", "runtime.", "tracking.", "data.cache", "data.remote."),
    *("checkpoint.interval", "checkpoint.keep", "checkpoint.async_save"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The rate of a kind of run.

    Attributes:
        chosen: the rate.
        losses: at the end of each trial, by rate; None: the trial failed.
        tokens: of a trial.
        seed: of all trials.
        lines: overrides of the trials but the rate; with others the choice is made anew.
    """

    chosen: float
    losses: dict[str, float | None]
    tokens: int
    seed: int
    lines: list[str]

    def sentence(self, kind: str) -> str:
        """Say what was tried and what came out."""
        tried = ", ".join(
            f"{rate}: {'failed' if loss is None else show('loss', loss)}"
            for rate, loss in self.losses.items()
        )
        rates = [float(rate) for rate in self.losses]
        end = {max(rates): "largest", min(rates): "smallest"}.get(self.chosen)
        beyond = f"; it is the {end} that was tried, a better one may lie beyond" if end else ""
        return (
            f"Rate of {kind}: {self.chosen}, by the losses after {self.tokens} tokens with seed "
            f"{self.seed} ({tried}){beyond}."
        )


@dataclass(frozen=True)
class Trial:
    """A run that tries a rate."""

    kind: str
    rate: float
    stage: PlannedStage
    tokens: int
    lines: list[str]

    def loss(self) -> float | None:
        """Return the loss at its end; None if it has not ended well."""
        if not self.stage.is_finished():
            return None
        loss = curve(read_metrics(self.stage.path / FILE_NAME)).mean(WINDOWS[TAIL])
        return loss if math.isfinite(loss) else None


class Rates:
    """Knows the rates that were chosen, and plans trials for those that were not.

    Attributes:
        choices: by kind of run.
        trials: those that have to end before the others can be chosen.
    """

    def __init__(self, study: StudyJob, stages: Stages) -> None:
        self.choices: dict[str, Choice] = {}
        self.trials: list[Trial] = []
        self._study, self._stages = study, stages
        self._written = written_rates(Path(study.run_dir))
        self._asked: set[str] = set()

    def of(
        self, kind: str, lines: Sequence[str], run_tokens: int, processes: int = 1
    ) -> float | None:
        """Return the rate of a kind of run; None if it is not chosen yet.

        Args:
            kind: of the run.
            lines: overrides of a variant; the first that asks for a kind is tried.
            run_tokens: of a run of it.
            processes: of such a run.
        """
        if kind not in self._asked:
            self._asked.add(kind)
            self._ask(kind, lines, int(run_tokens * self._study.rates.share), processes)
        return self.choices[kind].chosen if kind in self.choices else None

    def _ask(self, kind: str, lines: Sequence[str], tokens: int, processes: int) -> None:
        asked = self._study.rates
        own = [*lines, f"train.tokens={tokens}", f"train.seed={asked.seed}"]
        known = self._written.get(kind)
        rates = [str(rate) for rate in asked.candidates]
        if known and known.lines == own and list(known.losses) == rates:
            self.choices[kind] = known
            return
        for rate in asked.candidates:
            name = f"rate {rate} of {kind}"
            tried = [*own, f"{RATE_KEY}={rate}"]
            stage = self._stages.plan(name, "train", tried, asked.seed, processes)
            if stage is not None:  # else one that it reads cannot run, which is reported there
                self.trials.append(Trial(kind, rate, stage, tokens, own))


def written_rates(run_dir: Path) -> dict[str, Choice]:
    """Return what a study has chosen so far, by kind of run."""
    path = run_dir / RATES_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        formats.RATES.require_readable(found.pop(formats.KEY, None), path)
        return {kind: Choice(**one) for kind, one in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: this is not what a study wrote there ({error}); remove it, and the rates are "
            "chosen again"
        ) from error


def choose_rates(study: StudyJob, trials: Sequence[Trial]) -> None:
    """Choose between trials that have ended, and write that down.

    Raises:
        UserError: if no trial of a kind has ended well.
    """
    run_dir = Path(study.run_dir)
    choices = written_rates(run_dir)
    for kind in dict.fromkeys(one.kind for one in trials):
        tried = {one.rate: one for one in trials if one.kind == kind}
        losses = {rate: one.loss() for rate, one in tried.items()}
        ended = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not ended:
            logs = ", ".join(str(one.stage.log) for one in tried.values())
            raise UserError(
                f"rates.candidates: no rate of {kind} was trained with to the end, so none can be "
                f"chosen; their logs are {logs}"
            )
        first = next(iter(tried.values()))
        choices[kind] = Choice(
            chosen=min(ended, key=lambda rate: ended[rate]),
            losses={str(rate): loss for rate, loss in losses.items()},
            tokens=first.tokens,
            seed=study.rates.seed,
            lines=first.lines,
        )
        _log.info("%s", choices[kind].sentence(kind))
    run_dir.mkdir(parents=True, exist_ok=True)
    half = run_dir / f"{RATES_FILE}.tmp"
    known = {kind: asdict(one) for kind, one in choices.items()}
    half.write_text(json.dumps({formats.KEY: formats.RATES.stamp(), **known}, indent=2))
    half.replace(run_dir / RATES_FILE)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        variant: its name.
        seed: of data and weights.
        lines: overrides of `hybrid-train train`.
        folder: of the run.
        inputs: stages that it reads.
        job: what the lines compose to; None as long as that depends on what a stage will write, or
            on a rate that is not chosen.
        evaluation: what it is asked once it has ended; None: nothing.
        processes: that it takes.
    """

    variant: str
    seed: int
    lines: Sequence[str]
    folder: Path
    inputs: Sequence[PlannedStage]
    job: TrainJob | None
    evaluation: PlannedEvaluation | None = None
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

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
        length = tokens(self.job.train.tokens) if self.job else float("inf")
        return bool(lines) and lines[-1]["tokens"] >= length

    def stages(self) -> dict[str, PlannedStage]:
        """Return all stages that it comes from, by hash, in the order in which they run."""
        return {one.digest: one for last in self.inputs for one in (*last.ancestors(), last)}


@dataclass(frozen=True)
class StudyPlan:
    """What a study runs: stages, each behind those that it reads, then the runs of the variants.

    Attributes:
        stages: of them all.
        runs: of all variants and seeds.
        trials: stages, too; what they say chooses rates, and the runs are known only then.
        rates: that were chosen, by kind of run.
    """

    stages: Sequence[PlannedStage]
    runs: Sequence[PlannedRun]
    trials: Sequence[Trial]
    rates: Mapping[str, Choice]

    def of_trials(self) -> "StudyPlan":
        """Return the trials alone, and what they come from."""
        stages = {
            stage.digest: stage
            for trial in self.trials
            for stage in (*trial.stage.ancestors(), trial.stage)
        }
        return replace(self, stages=list(stages.values()), runs=[])

    def todo(self) -> tuple[list[PlannedStage], list[PlannedRun]]:
        """Return what is not finished; stages of finished runs alone are not made again."""
        runs = [run for run in self.runs if not run.is_finished()]
        of_runs = {digest for run in self.runs for digest in run.stages()}
        wanted = {digest for run in runs for digest in run.stages()}
        for stage in self.stages:
            if stage.digest not in of_runs:  # a result of its own, and what it comes from
                wanted |= {stage.digest, *(one.digest for one in stage.ancestors())}
        return [one for one in self.stages if one.digest in wanted and not one.is_finished()], runs

    def evaluations(self) -> list[PlannedEvaluation]:
        """Return what all runs are asked."""
        return [run.evaluation for run in self.runs if run.evaluation is not None]


def plan_study(study: StudyJob) -> StudyPlan:
    """Compose every stage and run; seed after seed, so that a stopped study has whole seeds.

    Raises:
        ConfigError: if any stage or variant cannot run, with every problem of each.
        UserError: if a run folder holds a run with other settings.
    """
    require_alone("study")
    with tempfile.TemporaryDirectory(prefix="hybrid_train_study_") as scratch:
        stages = Stages(study, Path(scratch))
        rates = Rates(study, stages)
        runs: list[PlannedRun] = []
        found: dict[str, list[Problem]] = {}
        for name in study.chosen():
            try:
                runs += _of_variant(study, name, stages, rates)
            except ConfigError as error:
                found[name] = list(error.problems)
        stages.plan_results()
        outside = list(_folder_problems(study, runs))
        if found or outside or stages.problems:
            of_stages = [
                replace(problem, path=f"{name}: {problem.path}")
                for name, problems in stages.problems.items()
                for problem in problems
            ]
            raise ConfigError([*of_stages, *_by_variant(found, len(study.chosen())), *outside])
        runs.sort(key=lambda run: study.seeds.index(run.seed))  # stable: variants in their order
        _require_same_runs(runs, stages)
        for run in runs:
            if run.evaluation and run.is_finished() and not run.evaluation.is_finished():
                run.evaluation.require_checkpoint()
    return StudyPlan(list(stages.planned.values()), runs, rates.trials, rates.choices)


def _of_variant(study: StudyJob, name: str, stages: Stages, rates: Rates) -> Iterator[PlannedRun]:
    """Yield the runs of a variant; what is the same for all seeds is composed once."""
    lines = [*study.base, *study.variants[name].overrides, *study.overrides]
    own = [*study.variants[name].overrides, *study.overrides]
    processes = study.variants[name].processes
    is_known = not study.rates.candidates or _names_rate(own)
    if not is_known and stages.inputs(lines, study.seeds[0]) is not None:
        kind, length = _kind_and_tokens(lines, study.seeds[0], stages, processes)
        rate = rates.of(name if study.rates.each else kind, lines, length, processes)
        is_known = rate is not None
        # One that is not chosen yet stands for the others; each of them is checked by its trial.
        lines.append(f"{RATE_KEY}={study.rates.candidates[0] if rate is None else rate}")
    composed: dict[tuple[str, ...], TrainJob | None] = {}
    asked = study.asked_of(name)
    for seed in study.seeds:
        inputs = stages.inputs([*lines, *asked], seed)
        if inputs is None:
            return  # a stage cannot run, which is reported there
        are_there = all(one.is_finished() for one in inputs.values())
        filled = tuple(stages.filled(lines, seed, ahead=not are_there))
        if filled not in composed:
            job = stages.checked("train", filled, processes)
            assert job is None or isinstance(job, TrainJob)
            composed[filled] = job
            if asked:
                stages.check_evaluation(asked, seed)
        job = copy.deepcopy(composed[filled]) if is_known else None
        folder = f"{study.run_dir}/{name}/seed_{seed}"
        if job is not None:
            job.train.seed, job.run_dir = seed, folder
        own = [f"train.seed={seed}", setting("run_dir", folder)]
        real = [*stages.filled(lines, seed, ahead=False), *own]
        run = PlannedRun(
            name, seed, real, Path(folder), tuple(inputs.values()), job, processes=processes
        )
        settings = stages.filled(asked, seed, ahead=False)
        evaluation = PlannedEvaluation(run.name, run.folder, settings) if asked else None
        yield replace(run, evaluation=evaluation)


def _names_rate(lines: Sequence[str]) -> bool:
    return any(line.partition("=")[0].lstrip("+~") == RATE_KEY for line in lines)


def _kind_and_tokens(
    lines: Sequence[str], seed: int, stages: Stages, processes: int
) -> tuple[str, int]:
    """Return of which kind a variant is, and the tokens of a run of it.

    Raises:
        ConfigError: if the lines say neither, with all that is wrong with them.
    """
    filled = stages.filled(lines, seed, ahead=True)
    known = stages.checked("train", filled, processes)
    assert known is None or isinstance(known, TrainJob)
    config = known or compose.draft("train", filled).config
    begins = "" if config.checkpoint.load is None else " from trained weights"
    return f"{config.objective.kind}{begins}", tokens(str(config.train.tokens))


def _folder_problems(study: StudyJob, runs: Sequence[PlannedRun]) -> Iterator[Problem]:
    """Yield why the study, or a run of it, cannot have its folder."""
    if (Path(study.run_dir) / frozen.FROZEN_NAME).is_file():
        yield Problem("run_dir", study.run_dir, "is the folder of a run; a study needs its own")
    for run in runs:
        if obstacle := what_forbids(run.folder):
            yield Problem("run_dir", str(run.folder), obstacle)
            return  # it is the same for all, or for all of a variant
        if not run.folder.is_dir() or not any(run.folder.iterdir()) or is_untrained(run.folder):
            continue
        if not (run.folder / frozen.FROZEN_NAME).is_file():
            rule = f"is not empty and no run folder: it has no {frozen.FROZEN_NAME}"
            yield Problem("run_dir", str(run.folder), rule)


def are_paired(one: TrainJob, other: TrainJob) -> bool:
    """Tell whether two runs with one seed start from the same weights and read the same batches."""
    return one.model == other.model and _batches(one) == _batches(other)


def _batches(job: TrainJob) -> tuple[Any, ...]:
    """Return what the rows of every step follow from; each phase has an order of its own."""
    phase_spans = lay_out(job)
    trains = [phase_span.job.train for phase_span in phase_spans]
    sizes = [(train.sequence_length, train.global_batch, train.batch_ramp) for train in trains]
    ends = [(phase_span.start, phase_span.end) for phase_span in phase_spans]
    return ends, sizes, [phase_span.job.data for phase_span in phase_spans]


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


def _require_same_runs(runs: Sequence[PlannedRun], stages: Stages) -> None:
    """Refuse folders whose runs were made with other settings."""
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        is_there = (run.folder / frozen.FROZEN_NAME).is_file() and not is_untrained(run.folder)
        if is_there and run.job is not None:
            for key, old, new in differences(frozen.load(run.folder), run.job):
                now = stages.as_it_will_be(new)
                if old != now and not key.startswith(_MAY_DIFFER):
                    found.setdefault(f"{key}: {old} there, {now} here", []).append(run)
    if found:
        text = "\n".join(
            f"  {change} ({', '.join(run.name for run in those)})"
            for change, those in found.items()
        )
        raise UserError(
            "runs of this study were made with other settings; nothing was started:\n"
            f"{text}\nChoose another run_dir=..., or remove these runs to repeat them"
        )
