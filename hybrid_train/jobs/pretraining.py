"""One training run from its checks to its summary, as one straight line."""

import contextlib
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.product_formats import quantizes
from hybrid_train.checkpoint import layout, store
from hybrid_train.checkpoint.retention import drop_partial
from hybrid_train.config import frozen, launcher
from hybrid_train.data.build import RunData, check_data, open_data
from hybrid_train.data.record import changes, read_record, record_of, write_record
from hybrid_train.hf import origin
from hybrid_train.jobs import attempts, run_folder
from hybrid_train.jobs.networks import TOKENIZER
from hybrid_train.jobs.phases import PhaseBuilder
from hybrid_train.jobs.progress import TextProgress
from hybrid_train.megatron.groups import destroy_groups
from hybrid_train.planning.phases import Stretch, at, lay_out, unread_sources, validation_interval
from hybrid_train.planning.ramp import ramps
from hybrid_train.runtime import ranks
from hybrid_train.runtime.logs import say_through
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.tracking import history
from hybrid_train.tracking.build import build_trackers
from hybrid_train.tracking.console import Console
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.plots import plot_losses
from hybrid_train.tracking.smoothing import losses_of
from hybrid_train.tracking.summary import summarise
from hybrid_train.tracking.throughput import Peak, Throughput, peak_flops
from hybrid_train.tracking.tracker import FanOut
from hybrid_train.training.bad_steps import BadSteps
from hybrid_train.training.hook import Hook, HookList
from hybrid_train.training.hooks.checkpointing import SaveCheckpoints, content_of, load_weights
from hybrid_train.training.hooks.garbage import CollectGarbage
from hybrid_train.training.hooks.metrics import LogMetrics
from hybrid_train.training.hooks.phases import EnterPhases
from hybrid_train.training.hooks.precision import AuditPrecision, MeasureRounding
from hybrid_train.training.hooks.profiling import profiling_hooks
from hybrid_train.training.hooks.recovery import Recover, ways_on
from hybrid_train.training.hooks.stop import StopOnSignal
from hybrid_train.training.hooks.stragglers import CompareProcesses
from hybrid_train.training.hooks.validation import Validate
from hybrid_train.training.loop import Run, fit
from hybrid_train.training.nonfinite import NonFiniteError
from hybrid_train.training.state import TrainState

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins: nowhere, its own newest checkpoint, or one of another run."""

    found: layout.Found | None
    weights_only: bool = False
    is_own: bool = False

    @property
    def own_step(self) -> int:
        """Step of the checkpoint in the run's own folder; -1 if it has none yet."""
        return self.found.step if self.found and self.is_own else -1

    def state(self) -> TrainState:
        """Return the position to go on from."""
        if self.found is None or self.weights_only:
            return TrainState()
        return TrainState(**self.found.position())


def train(job: TrainJob, device: torch.device) -> int:
    """Run a checked job; return 0, or 128 + signal if a signal stopped it after a save."""
    start = _claim(job)
    state = start.state()
    if start.found and state.tokens >= tokens(job.train.tokens):
        _log.info(
            "%s is complete: %d tokens of train.tokens=%s; a larger train.tokens trains on",
            *(start.found.run_dir, state.tokens, job.train.tokens),
        )
        if start.is_own and ranks.is_main():
            _say_summary(Path(job.run_dir))
        return 0
    with contextlib.closing(StopOnSignal(job.recovery.time_limit_s)) as stop:
        _attempt(job, device, start, stop)
    outcome, _, cause, _ = stop.how_it_ended()
    if outcome == history.STOPPED:
        _log.info("%s; the same command goes on", cause)
    return 0 if stop.signal is None else _exit_code(stop.signal)


def leave_nothing_behind() -> None:
    """Forget what belongs to the process rather than to the run, which may have failed anywhere."""
    destroy_groups()


def _attempt(job: TrainJob, device: torch.device, start: Start, stop: StopOnSignal) -> None:
    """Open the data, refuse what cannot go on, and train; the history says how it ended."""
    run_dir, state = Path(job.run_dir), start.state()
    data = _open_data(job, lay_out(job), start)
    record = _same_data(job, data, state) if start.is_own else record_of(data)
    with attempts.attempt(run_dir, state.step, job.runtime.hang_timeout_s) as attempt:
        if ranks.is_main():
            run_folder.take_over(job)
            frozen.freeze(job, run_dir)
            write_record(run_dir, record)
            data.tokenizer.save(run_dir / TOKENIZER)
            if not start.is_own:
                origin.pass_on(start.found.run_dir if start.found else None, run_dir)
        _fit(job, device, start, data, stop)
        if ranks.is_main():
            attempt.end(*stop.how_it_ended())


def _exit_code(number: signal.Signals) -> int:
    """Return 128 + signal; 0 under torchrun after SIGUSR1, which would start the run again."""
    asked_by_launcher = number is signal.SIGUSR1 and launcher.by_torchrun()
    return 0 if asked_by_launcher else 128 + number


def _fit(
    job: TrainJob, device: torch.device, start: Start, data: RunData, stop: StopOnSignal
) -> None:
    """Build the run, train it to its end or until it is stopped, and say what came of it."""
    run_dir, state, stretches = Path(job.run_dir), start.state(), lay_out(job)
    builder = PhaseBuilder(data, device, run_dir)
    run = builder.build(at(stretches, state.tokens), state, tokens(job.train.tokens))
    _restore(start, run)
    run.bad_steps = _bad_steps(job, run_dir, start, at(stretches, state.tokens).start)
    peak = peak_flops(device, job.runtime.peak_tflops)
    failures = job.recovery.max_failed_saves
    saving = SaveCheckpoints(job.checkpoint, run_dir, start.own_step, failures)

    def enter(run: Run, phase: Stretch, before: Stretch) -> None:
        builder.enter(run, phase, before, saving)
        run.bad_steps.forget()

    run.hooks = HookList(
        [
            *profiling_hooks(job.profile, Path(job.run_dir)),
            EnterPhases(stretches, enter),
            AuditPrecision(run_dir, lambda seen: at(stretches, seen).job),
            *_rounding(job, stretches, start.own_step),
            *_hooks(job, run, data, peak),
            *([CompareProcesses(job.recovery, run_dir)] if _compares(job) else []),
            Recover(job.recovery, run_dir, saving.settle),
            saving,
            stop,
        ]
    )
    try:
        fit(run)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}. {ways_on(run_dir)}") from None
    finally:
        say_through(None)
    if ranks.is_main():
        _conclude(run_dir, peak)


def _claim(job: TrainJob) -> Start:
    """Refuse what cannot run before anything is written, and find where to start."""
    run_dir = Path(job.run_dir)

    def check() -> None:
        run_folder.require_access(run_dir)
        run_folder.require_readable(run_dir)
        attempts.require_alone(run_dir)
        run_folder.require_same_run(job)
        check_data(job.data)
        sizes = counts.parameters(job.model, job.model.vocab_size or _asked_vocab_size(job))
        run_folder.require_space(run_dir, sizes.total)
        for leftover in drop_partial(run_dir):
            _log.warning("removed %s, which an interrupted save left behind", leftover)
        attempts.conclude(run_dir)

    ranks.main_first(check)
    own = store.newest_sound(run_dir, _set_aside)
    if own is not None:
        _log.info("going on from %s", own.path)
        return Start(own, is_own=True)
    if job.checkpoint.load is None:
        return Start(None)
    found = layout.locate(Path(job.checkpoint.load))
    run_folder.require_same_model(job, found)
    if damaged := store.damages(found):
        error = UserError(f"{found.path} is damaged: {damaged}; take another checkpoint")
        error.everywhere = True
        raise error
    weights_only = job.checkpoint.load_only is not None
    _log.info("starting from %s of %s", "the weights" if weights_only else "all", found.path)
    return Start(found, weights_only)


def _set_aside(found: layout.Found, damaged: str) -> None:
    place = layout.set_aside(found)
    before = layout.latest(found.run_dir)
    instead = f"step {before.step}" if before else "the start"
    _log.warning("%s is damaged: %s", found.path, damaged)
    _log.warning("it is now %s, and the run goes on from %s", place, instead)
    history.note(found.run_dir, "fallback", step=found.step, damage=damaged, instead=instead)


def _asked_vocab_size(job: TrainJob) -> int:
    return job.data.vocab_size if isinstance(job.data, Quickstart) else 0


def _open_data(job: TrainJob, stretches: list[Stretch], start: Start) -> RunData:
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        data = open_data(
            job, stretches, barrier=ranks.barrier, is_main=ranks.is_main(), report=shown.update
        )
    if job.model.vocab_size is None:
        # Weights keep their vocabulary, also where another one would fit into the same padding.
        loaded = frozen.load(start.found.run_dir).model.vocab_size if start.found else None
        for phase_job in (job, *(stretch.job for stretch in stretches)):
            phase_job.model.vocab_size = loaded or data.vocab_size
    assert job.model.vocab_size is not None
    if unread := unread_sources(job):
        _log.info(
            "the phases name sources (%s), this run has none: all phases read %s",
            ", ".join(unread),
            "the quickstart" if isinstance(job.data, Quickstart) else "data.train",
        )
    if job.model.vocab_size < data.vocab_size:
        remedy = (
            f"the weights of {start.found.run_dir} have no more rows; take its tokenizer, "
            "and data that it made"
            if start.found
            else "leave model.vocab_size out to take its size"
        )
        raise UserError(
            f"model.vocab_size = {job.model.vocab_size}: the tokenizer has {data.vocab_size} "
            f"tokens; {remedy}"
        )
    for line in data.description():
        _log.info("%s", line)
    return data


def _same_data(job: TrainJob, data: RunData, state: TrainState) -> dict[str, Any]:
    """Return the record of the data; refuse to go on with other data, unless that is accepted."""
    run_dir, now = Path(job.run_dir), record_of(data)
    before = read_record(run_dir)
    found = changes(before, now) if before else []
    if found and not job.data.accept_changes:
        lines = "\n".join(f"  {line}" for line in found)
        error = UserError(
            f"the data of {run_dir} has changed since step {state.step}:\n{lines}\nBring it back, "
            "or go on with what is there: data.accept_changes=true (it is noted in the run folder)"
        )
        error.everywhere = True
        raise error
    for line in found:
        _log.warning("%s; accepted", line)
    if found and ranks.is_main():
        history.note(run_dir, "data changed", step=state.step, changes=found)
    return now


def _restore(start: Start, run: Run) -> None:
    engine = run.engine
    if start.found is None:
        return
    if start.weights_only:
        load_weights(start.found.path, engine)
    else:
        store.load(start.found, content_of(engine))
        run.batches.load_state_dict(run.state.batches)


def _bad_steps(job: TrainJob, run_dir: Path, start: Start, phase_start: int) -> BadSteps:
    """Go on to judge losses with those that a run that goes on has had in this phase."""

    def before() -> list[dict[str, float]]:
        path = run_dir / FILE_NAME
        lines = read_metrics(path) if start.is_own and path.exists() else []
        known = (line for line in lines if line["step"] <= start.own_step)
        return [line for line in known if line["tokens"] > phase_start]

    lines = ranks.said_by_main(lambda: before()[-2 * job.recovery.spike_window :])
    return BadSteps(job.recovery, lines)


def _compares(job: TrainJob) -> bool:
    return ranks.world_size() > 1 and job.recovery.straggler_interval > 0


def _hooks(job: TrainJob, run: Run, data: RunData, peak: Peak) -> list[Hook]:
    """List what reacts to the loop; first those that add to the report of a step."""
    hooks: list[Hook] = []
    if run.validation is not None:
        baseline = (lambda: data.unigram_cross_entropy) if ranks.is_main() else (lambda: None)
        hooks.append(Validate(validation_interval(job), baseline))
    log = LogMetrics(
        _trackers(job, run),
        Throughput(peak.flops, ranks.world_size()),
        batch_changes=ramps(job.train) or bool(job.train.phases),
        source_sizes={name: one.tokens for name, one in data.train.documents.items()},
    )
    return [*hooks, *built_from(job.hooks), log, CollectGarbage()]


def _rounding(job: TrainJob, stretches: list[Stretch], own_step: int) -> list[Hook]:
    """Measure what rounding does where products of any phase are quantized and it is asked for."""
    interval = job.precision.statistics_interval
    jobs = [stretch.job for stretch in stretches]
    if not interval or not any(quantizes(each.model, each.precision) for each in jobs):
        return []
    return [MeasureRounding(Path(job.run_dir), interval, max(own_step, 0))]


def _trackers(job: TrainJob, run: Run) -> FanOut:
    """Open the trackers; on the main process only, the others have none."""
    if not ranks.is_main():
        return FanOut()
    trackers = build_trackers(job.tracking, Path(job.run_dir), run.state.step, frozen.to_dict(job))
    # The trackers have left out by now what the run has to take again.
    before = losses_of(read_metrics(Path(job.run_dir) / FILE_NAME))
    console = Console(run.token_budget, run.state.tokens, job.tracking.console_interval, before)
    say_through(console.say)
    return FanOut([*trackers, console])


def _conclude(run_dir: Path, peak: Peak) -> None:
    plot_losses(run_dir / FILE_NAME, run_dir / "plots" / "loss.png", run_dir.resolve().name)
    _say_summary(run_dir, peak.source)


def _say_summary(run_dir: Path, peak: str = "") -> None:
    print(summarise(run_dir, peak))  # noqa: T201  the result of the command
