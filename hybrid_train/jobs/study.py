"""The job `study`: trains every variant with every seed, compares them, and writes what came out.

Each run is an ordinary `hybrid-train train` in a process of its own. A study that was stopped goes
on with the same command: finished runs stay as they are, one in the middle resumes by itself.
"""

import logging
import os
import shutil
import statistics
from collections.abc import Sequence

from hybrid_train.checkpoint.layout import FOLDER as CHECKPOINTS
from hybrid_train.data.quickstart import prepare
from hybrid_train.jobs import multirun
from hybrid_train.jobs.run_queue import Command, run_queue
from hybrid_train.jobs.study_plan import PlannedRun, plan
from hybrid_train.jobs.study_report import report
from hybrid_train.runtime.logs import start_logging
from hybrid_train.runtime.start import choose_device
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.study import StudyJob
from hybrid_train.tracking.gaps import TAIL, WINDOWS, curve
from hybrid_train.tracking.metrics import show, show_duration

_LAST_LINES = 15  # of the log of a run that failed
_log = logging.getLogger(__name__)


def run(study: StudyJob) -> int:
    """Run what is not finished, then compare; return 0, 128 + signal, or the code of a failed run.

    Raises:
        UserError: before anything starts, if any variant cannot run.
    """
    start_logging()
    runs = plan(study)
    at_once, threads = _at_once(study, runs)
    todo = [run for run in runs if not run.is_finished()]
    _log.info(
        "%d runs: %d variants x %d seeds; %d finished before; %d at once with %d thread(s) each",
        *(len(runs), len(study.chosen()), len(study.seeds), len(runs) - len(todo)),
        *(at_once, threads),
    )
    _prepare_data(todo)
    progress = _Progress(study, runs, todo, at_once)
    commands = [_command(run, threads) for run in todo]
    signal = run_queue(commands, at_once, threads, progress.ended)
    if signal is not None:
        _log.info("stopped by %s; the same command goes on", signal.name)
        return 128 + signal
    report(study, runs)
    return next(iter(progress.codes.values()), 0)


def _at_once(study: StudyJob, runs: Sequence[PlannedRun]) -> tuple[int, int]:
    """Return how many runs go at a time, and the threads of each."""
    cores = len(os.sched_getaffinity(0))
    on_gpu = choose_device(runs[0].job.runtime).type == "cuda"
    at_once = study.parallel or (1 if on_gpu else cores)
    return at_once, max(1, cores // at_once)


def _prepare_data(runs: Sequence[PlannedRun]) -> None:
    """Build a quickstart corpus once, before several runs ask for it at the same time."""
    for data in (run.job.data for run in runs):
        if isinstance(data, Quickstart):
            prepare(data)  # at once where it is there


def _command(run: PlannedRun, threads: int) -> Command:
    lines = [*run.lines, f"runtime.threads={threads}"]
    return Command(multirun.command("train", lines), run.log)


class _Progress:
    """Says a line for each run that ends, and tidies up behind it.

    Attributes:
        codes: exit codes of the runs that failed, by name.
    """

    def __init__(
        self,
        study: StudyJob,
        runs: Sequence[PlannedRun],
        todo: Sequence[PlannedRun],
        at_once: int,
    ) -> None:
        self.codes: dict[str, int] = {}
        self._study, self._runs, self._at_once = study, runs, at_once
        self._todo = todo
        self._seconds: dict[str, list[float]] = {}  # of finished runs, by variant
        self._left = list(todo)

    def ended(self, number: int, code: int, seconds: float) -> None:
        """Take note of a run that has ended."""
        run = self._todo[number]
        self._left.remove(run)
        self._seconds.setdefault(run.variant, []).append(seconds)
        place = f"run {len(self._runs) - len(self._left)} of {len(self._runs)}  {run.name}"
        if code or not run.is_finished():
            self.codes[run.name] = code or 1
            _log.error("%s failed with exit code %d; %s ends:\n%s", place, code, run.log, _end(run))
            return
        if not self._study.keep_checkpoints:
            shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        losses = curve(run.metrics())
        _log.info(
            "%s  loss %s  val %s  in %s  left %s",
            place,
            show("loss", losses.mean(WINDOWS[TAIL])),
            show("validation_loss", losses.validation),
            show_duration(seconds),
            show_duration(self._seconds_left()),
        )

    def _seconds_left(self) -> float:
        """Estimate from runs of the same variant, else from all; what runs now counts whole."""
        known = {variant: statistics.fmean(took) for variant, took in self._seconds.items()}
        usual = statistics.fmean(known.values())
        return sum(known.get(run.variant, usual) for run in self._left) / self._at_once


def _end(run: PlannedRun) -> str:
    """Return the last lines of the log of a run."""
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])
