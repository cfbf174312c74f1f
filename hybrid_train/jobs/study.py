"""The job `study`: trains every variant with every seed, and compares the variants.

Each stage and run is an ordinary `hybrid-train` command in a process of its own; what chooses the
learning rates comes first. A study that was stopped goes on with the same command: what is finished
stays, a run in the middle resumes.

`run_queue` runs the commands, several at once. A command may wait for others; if one of these
fails, it is not started. A signal to this process is passed on, so that every running command may
save and end; none is started after it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.checkpoint.layout import FOLDER as CHECKPOINTS
from hybrid_train.config.rules_of_data import what_forbids
from hybrid_train.data.quickstart import prepare
from hybrid_train.jobs import multirun
from hybrid_train.jobs.study_evaluation import COMMAND, PlannedEvaluation
from hybrid_train.jobs.study_plan import PlannedRun, StudyPlan, choose_rates, plan_study
from hybrid_train.jobs.study_report import report
from hybrid_train.jobs.study_stages import PlannedStage
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.runtime.heartbeat import StopSignals
from hybrid_train.runtime.logs import start_logging
from hybrid_train.runtime.start import choose_device
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.study import StudyJob
from hybrid_train.schema.units import counted
from hybrid_train.tracking.gaps import TAIL, WINDOWS, curve
from hybrid_train.tracking.metrics import show, show_duration

_POLL_S = 0.2
Running = dict[int, tuple["subprocess.Popen[bytes]", float]]  # by number: process, start
_LAST_LINES = 15  # of the log of a run that failed
_TAKE_THREADS = ("train", "distill_targets", "importance", "generate", "verify", "evaluate")
Task = PlannedStage | PlannedRun | PlannedEvaluation
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One process to run.

    Attributes:
        words: of it.
        log: file that takes what it says.
        after: numbers of the commands that must have ended well before it starts.
        threads: of it alone, where nothing can run beside it; None: those of the queue.
        processes: that it is; one of several waits until so many can run.
    """

    words: Sequence[str]
    log: Path
    after: Sequence[int] = ()
    threads: int | None = None
    processes: int = 1


def run(job: StudyJob) -> int:
    """Run what is not finished, then compare; return 0, 128 + signal, or the code of a failed run.

    Raises:
        UserError: before anything starts, if any stage or variant cannot run.
    """
    start_logging()
    study = job.as_asked()
    planned = plan_study(study)
    if planned.trials:
        first = planned.of_trials()
        stages, _ = first.todo()
        tried, to_run = counted(len(planned.trials), "rate"), counted(len(stages), "stage")
        _log.info("%s to try; %s to run for them", tried, to_run)
        stopped, _ = _run_tasks(study, first, stages, [])
        if stopped is not None:
            return 128 + stopped
        choose_rates(study, planned.trials)
        planned = plan_study(study)
    stages, runs = planned.todo()
    if planned.stages:
        _log.info("%s; %d to run", counted(len(planned.stages), "stage"), len(stages))
    finished = len(planned.runs) - len(runs)
    _log.info(
        "%s: %s x %s; %d finished before",
        counted(len(planned.runs), "run"),
        counted(len(study.chosen()), "variant"),
        counted(len(study.seeds), "seed"),
        finished,
    )
    stopped, codes = _run_tasks(study, planned, stages, runs)
    if stopped is not None:
        return 128 + stopped
    # What depended on a stage is known by now.
    report(study, plan_study(study) if stages else planned)
    return next(iter(codes.values()), 0)


def _run_tasks(
    study: StudyJob, planned: StudyPlan, stages: Sequence[PlannedStage], runs: Sequence[PlannedRun]
) -> tuple[signal.Signals | None, dict[str, int]]:
    """Run stages and runs; return the signal that stopped them, and exit codes of what failed.

    Raises:
        UserError: if another study makes one of the stages.
    """
    at_once = _at_once(study, [*runs, *stages])
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // at_once)
    tasks = [*stages, *_with_evaluations(planned, runs)]
    with _locked(stages):
        _log.info("%d at once, %s each", at_once, counted(threads, "thread"))
        _prepare_data(tasks)
        progress = _Progress(study, planned, tasks, at_once)
        commands = _commands(tasks, threads, cores if study.parallel is None else threads)
        received = run_queue(commands, at_once, threads, progress.ended)
    if received is not None:
        _log.info("stopped by %s; the same command goes on", received.name)
    return received, progress.codes


def _with_evaluations(planned: StudyPlan, runs: Sequence[PlannedRun]) -> list[Task]:
    """Return runs, each with what it is asked behind it, and what is left of finished ones."""
    left = {run.name for run in runs}
    of_finished = [run.evaluation for run in planned.runs if run.name not in left]
    tasks: list[Task] = [one for one in of_finished if one and not one.is_finished()]
    for run in runs:
        tasks += [run, run.evaluation] if run.evaluation else [run]
    return tasks


def _at_once(study: StudyJob, tasks: Sequence[Task]) -> int:
    """Return how many commands go at a time."""
    known = (getattr(task.job, "runtime", None) for task in tasks)
    runtime = next((one for one in known if one is not None), Runtime())
    on_gpu = choose_device(runtime).type == "cuda"
    return study.parallel or (1 if on_gpu else len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def _locked(stages: Sequence[PlannedStage]) -> Iterator[None]:
    """Keep other studies from making the same stages, and tidy up what cannot be gone on with.

    Raises:
        UserError: if another study makes one of them, or the folder cannot be used.
    """
    with contextlib.ExitStack() as held:
        for stage in stages:
            folder = stage.path.parent
            if obstacle := what_forbids(folder):
                raise UserError(f"stages_dir = {folder}: {obstacle}")
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(stage.path.with_name(f"{stage.path.name}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"stage {stage.name}: another study makes it now, in {stage.path}; "
                    "start this one again when that has ended"
                ) from error
        for stage in stages:
            stage.mark.unlink(missing_ok=True)  # of a folder that is gone: it must not vouch again
            if not stage.resumes:
                shutil.rmtree(stage.path, ignore_errors=True)
        yield


def _prepare_data(tasks: Sequence[Task]) -> None:
    """Build a quickstart corpus once, before several runs ask for it at the same time."""
    for data in (getattr(task.job, "data", None) for task in tasks):
        if isinstance(data, Quickstart):
            with TextProgress(terminal=sys.stderr.isatty()) as shown:
                prepare(data, report=shown.update)  # at once where it is there


def _commands(tasks: Sequence[Task], threads: int, alone: int) -> list[Command]:
    """Return the commands of what is to do; one that nothing can run beside gets all cores."""
    numbers = {_key(task): number for number, task in enumerate(tasks)}
    after = [[numbers[key] for key in _read_by(task) if key in numbers] for task in tasks]
    depths: list[int] = []
    for before in after:
        depths.append(1 + max((depths[number] for number in before), default=-1))
    at_depth = Counter(depths)
    commands = []
    for task, before, depth in zip(tasks, after, depths, strict=True):
        processes = 1 if isinstance(task, PlannedEvaluation) else task.processes
        own = alone // processes if at_depth[depth] == 1 and len(tasks) > 1 else threads
        own, name = max(1, own), _command_of(task)
        lines = [*task.lines, *([f"runtime.threads={own}"] if name in _TAKE_THREADS else [])]
        words = multirun.command(name, lines, processes)
        commands.append(Command(words, task.log, before, own, processes))
    return commands


def _key(task: Task) -> str:
    return task.digest if isinstance(task, PlannedStage) else task.name


def _read_by(task: Task) -> list[str]:
    """Return the keys of what must have ended before a command can begin."""
    if isinstance(task, PlannedEvaluation):
        return [task.run]
    return [one.digest for one in task.inputs]


def _command_of(task: Task) -> str:
    if isinstance(task, PlannedStage):
        return task.command
    return "train" if isinstance(task, PlannedRun) else COMMAND


class _Progress:
    """Says a line for each command that ends, and tidies up behind it.

    Attributes:
        codes: exit codes of those that failed, by name.
    """

    def __init__(
        self, study: StudyJob, planned: StudyPlan, todo: Sequence[Task], at_once: int
    ) -> None:
        self.codes: dict[str, int] = {}
        self._study, self._planned, self._todo, self._at_once = study, planned, todo, at_once
        self._seconds: dict[str, list[float]] = {}  # of what has ended, by kind
        self._left = list(todo)

    def ended(self, number: int, code: int, seconds: float) -> None:
        """Take note of a command that has ended."""
        task = self._todo[number]
        self._left.remove(task)
        self._seconds.setdefault(_kind(task), []).append(seconds)
        if not isinstance(task, PlannedRun) and code == 0:
            task.finish(seconds)
        place = self._place(task)
        if code or not (task.is_finished() or task.job is None):
            self.codes[task.name] = code or 1
            _log.error(
                "%s failed with exit code %d; %s ends:\n%s", place, code, task.log, _log_end(task)
            )
            return
        took = f"in {show_duration(seconds)}  left {show_duration(self._seconds_left())}"
        if isinstance(task, PlannedEvaluation) or (
            isinstance(task, PlannedRun) and task.evaluation is None
        ):
            self._tidy(task)
        if not isinstance(task, PlannedRun):
            _log.info("%s  %s", place, took)
            return
        losses = curve(task.metrics())
        _log.info(
            "%s  loss %s  val %s  %s",
            place,
            show("loss", losses.mean(WINDOWS[TAIL])),
            show("validation_loss", losses.validation),
            took,
        )

    def _tidy(self, task: PlannedRun | PlannedEvaluation) -> None:
        """Remove the checkpoints of a run that nothing reads any more."""
        if not self._study.keep_checkpoints:
            folder = task.folder if isinstance(task, PlannedRun) else task.of_run
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

    def _place(self, task: Task) -> str:
        """Name a command and say how many of its sort have ended."""
        words = {PlannedStage: "stage", PlannedRun: "run", PlannedEvaluation: "evaluation"}
        word = words[type(task)]
        every: Mapping[str, Sequence[Task]] = {
            "stage": self._planned.stages, "run": self._planned.runs,
            "evaluation": self._planned.evaluations(),
        }  # fmt: skip
        left = sum(isinstance(one, type(task)) for one in self._left)
        number = len(every[word])
        return f"{word} {number - left} of {number}  {task.name}"

    def _seconds_left(self) -> float:
        """Estimate from what was of the same kind, else from all; what runs now counts whole."""
        known = {kind: statistics.fmean(took) for kind, took in self._seconds.items()}
        usual = statistics.fmean(known.values())
        return sum(known.get(_kind(task), usual) for task in self._left) / self._at_once


def _kind(task: Task) -> str:
    if isinstance(task, PlannedRun):
        return task.variant
    return COMMAND if isinstance(task, PlannedEvaluation) else task.name


def _log_end(task: Task) -> str:
    """Return the last lines of the log of a command."""
    lines = task.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LAST_LINES:])


def run_queue(
    commands: Sequence[Command],
    at_once: int,
    threads: int,
    ended: Callable[[int, int, float], None],
) -> signal.Signals | None:
    """Run commands in their order, at most `at_once` of them at a time.

    Args:
        commands: what to run.
        at_once: processes at a time; a command of more of them runs alone.
        threads: of each process, by OMP_NUM_THREADS.
        ended: called with the number of a command, its exit code and its seconds as it ends,
            unless a signal has stopped the queue.

    Returns:
        The signal that stopped the queue; None if it came to its end.
    """
    waiting = list(range(len(commands)))
    running: Running = {}
    well: set[int] = set()
    stop, passed_on = StopSignals(), False
    try:
        while running or (waiting and stop.received is None):
            ready = [n for n in waiting if well.issuperset(commands[n].after)]
            has_room = _with_room(commands, ready, running, at_once)
            for number in has_room if stop.received is None else ():
                waiting.remove(number)
                running[number] = (_start_process(commands[number], threads), time.monotonic())
            if not running:
                break  # all that wait, wait for one that failed
            if stop.received is not None and not passed_on:
                passed_on = True
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            for number, code, seconds in _taken_ended(running):
                if stop.received is None:
                    ended(number, code, seconds)
                if code == 0:
                    well.add(number)
            time.sleep(_POLL_S)
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
        stop.restore()
    return stop.received


def _with_room(
    commands: Sequence[Command], ready: Sequence[int], running: Running, at_once: int
) -> list[int]:
    """Return which commands can begin now, in their order.

    None overtakes another: what takes several processes would wait for ever.
    """
    found: list[int] = []
    busy = sum(commands[number].processes for number in running)
    for number in ready:
        busy += commands[number].processes
        if busy > at_once and (found or running):
            break
        found.append(number)
    return found


def _taken_ended(running: Running) -> list[tuple[int, int, float]]:
    """Take out what has ended; return number, exit code and seconds of each."""
    found = []
    for number, (process, started) in list(running.items()):
        code = process.poll()
        if code is not None:
            del running[number]
            found.append((number, code, time.monotonic() - started))
    return found


def _start_process(command: Command, threads: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(command.threads or threads)}
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        # A session of its own: Ctrl-C on the terminal reaches it through this process alone, once.
        return subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
