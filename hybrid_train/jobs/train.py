"""The job `train`: from a checked config to a trained model, or on from where a run stopped.

claim     the folder, and where the run starts              jobs/run_start.py
open      its data; other data than before is refused       jobs/run_start.py, data/
attempt   is noted in the folder, and watched                jobs/attempts.py
build     networks, optimizer, objective of the phase        jobs/phase_builder.py
restore   weights, optimizer, position, if there are any     checkpoint/
hooks     what reacts to the loop, in the order below        training/hooks/
fit       until the tokens are spent, or somebody stops it   training/loop.py
conclude  a plot and a summary                               tracking/
"""

import contextlib
import logging
import signal
import threading
from pathlib import Path

import torch

from hybrid_train.anatomy.gemm_formats import quantizes
from hybrid_train.checkpoint.layout import TOKENIZER
from hybrid_train.config import checks, frozen, launcher
from hybrid_train.config.rules_of_precision import hardware_notes, on_a_gpu
from hybrid_train.data.record import record_of, write_record
from hybrid_train.data.run_data import RunData
from hybrid_train.hf import origin
from hybrid_train.jobs import attempts, run_folder
from hybrid_train.jobs.phase_builder import PhaseBuilder
from hybrid_train.jobs.run_start import Start, bad_steps, claim, open_run_data, restore, same_data
from hybrid_train.megatron.data_parallel import destroy_groups
from hybrid_train.planning.phases import PhaseSpan, lay_out, phase_at, ramps, validation_interval
from hybrid_train.runtime import ranks
from hybrid_train.runtime.logs import say_through
from hybrid_train.runtime.start import process
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.precision import Backend
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.tracking import history
from hybrid_train.tracking.console import Console, summarise
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import losses_of
from hybrid_train.tracking.plots import plot_losses
from hybrid_train.tracking.throughput import Peak, Throughput, peak_flops
from hybrid_train.tracking.trackers import FanOut, build_trackers
from hybrid_train.training.bad_steps import NonFiniteError
from hybrid_train.training.hooks.checkpointing import EnterPhases, Recover, SaveCheckpoints, ways_on
from hybrid_train.training.hooks.processes import CollectGarbage, CompareProcesses, StopOnSignal
from hybrid_train.training.hooks.profiling import profiling_hooks
from hybrid_train.training.hooks.reporting import LogMetrics, Validate
from hybrid_train.training.hooks.rounding import AuditPrecision, MeasureRounding
from hybrid_train.training.loop import Hook, HookList, Run, fit

_log = logging.getLogger(__name__)


def run(job: TrainJob) -> int:
    """Train; return the exit code: 0, or 128 + signal if a signal stopped the run after a save.

    A process may train one run after another: a run leaves nothing behind but imported libraries
    and, on a CPU, their redirected calls.

    Raises:
        UserError: if the run cannot start, or ends for a reason that the user can fix.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "a run listens for signals, which Python allows in its main thread alone: train there"
        )
    with process(job.runtime, job.train.seed) as device:
        require_hardware(job, device)
        try:
            return _train(job, device)
        finally:
            destroy_groups()  # they belong to the process, and the run may have failed anywhere


def require_hardware(job: TrainJob, device: torch.device) -> None:
    """Refuse what the GPU that was found does not compute; say what one would where there is none.

    Raises:
        ConfigError: if `runtime.device=auto` has found a GPU that is to compute what it cannot.
    """
    notes = hardware_notes(job)
    if notes and device.type == "cuda" and job.precision.backend is Backend.auto:
        error = ConfigError(checks.check(on_a_gpu(job), ranks.world_size()))
        error.on_all_ranks = True
        raise error
    if notes:
        words = "\n".join(f"  {note}" for note in notes)
        _log.info("quantized GEMMs are emulated; a GPU would refuse this run:\n%s", words)


def _train(job: TrainJob, device: torch.device) -> int:
    start = claim(job)
    if start.found and start.state().tokens >= tokens(job.train.tokens):
        _log.info(
            "%s is complete: %d tokens of train.tokens=%s; a larger train.tokens trains on",
            *(start.found.run_dir, start.state().tokens, job.train.tokens),
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


def _exit_code(number: signal.Signals) -> int:
    """Return 128 + signal; 0 under torchrun after SIGUSR1, which would start the run again."""
    asked_by_launcher = number is signal.SIGUSR1 and launcher.by_torchrun()
    return 0 if asked_by_launcher else 128 + number


def _attempt(job: TrainJob, device: torch.device, start: Start, stop: StopOnSignal) -> None:
    """Open the data, refuse what cannot go on, and train; the history says how it ended."""
    run_dir, state, phases = Path(job.run_dir), start.state(), lay_out(job)
    data = open_run_data(job, phases, start)
    record = same_data(job, data, state) if start.is_own else record_of(data)
    with attempts.attempt(run_dir, state.step, job.runtime.hang_timeout_s) as attempt:
        if ranks.is_main():
            run_folder.take_over(job)
            frozen.freeze(job, run_dir)
            write_record(run_dir, record)
            data.tokenizer.save(run_dir / TOKENIZER)
            if not start.is_own:
                origin.pass_on(start.found.run_dir if start.found else None, run_dir)
        builder = PhaseBuilder(data, device, run_dir)
        run = builder.build(phase_at(phases, state.tokens), state, tokens(job.train.tokens))
        restore(start, run)
        run.bad_steps = bad_steps(job, start, phase_at(phases, state.tokens).start)
        peak = peak_flops(device, job.runtime.peak_tflops)
        run.hooks = HookList([*_hooks(job, run, builder, phases, start.own_step, peak), stop])
        _fit(run, run_dir)
        if ranks.is_main():
            plot_losses(run_dir / FILE_NAME, run_dir / "plots" / "loss.png", run_dir.resolve().name)
            _say_summary(run_dir, peak.source)
            attempt.end(*stop.how_it_ended())


def _hooks(
    job: TrainJob,
    run: Run,
    builder: PhaseBuilder,
    phases: list[PhaseSpan],
    own_step: int,
    peak: Peak,
) -> list[Hook]:
    """List what reacts to the loop, in the order in which it does."""
    run_dir = builder.run_dir
    saving = SaveCheckpoints(job.checkpoint, run_dir, own_step, job.recovery.max_failed_saves)

    def enter(run: Run, phase: PhaseSpan, before: PhaseSpan) -> None:
        builder.enter(run, phase, before, saving)
        run.bad_steps.forget()

    return [
        *profiling_hooks(job.profile, run_dir),
        EnterPhases(phases, enter),
        # These add to the report of a step, of which the trackers are told after them.
        AuditPrecision(run_dir, lambda seen: phase_at(phases, seen).job),
        *_rounding(job, phases, own_step),
        *_validation(job, run, builder.data),
        *built_from(job.hooks),
        _metrics(job, run, builder.data, peak),
        CollectGarbage(),
        *_comparison(job),
        # A run that goes back is not saved where it was.
        Recover(job.recovery, run_dir, saving.settle),
        saving,
    ]


def _fit(run: Run, run_dir: Path) -> None:
    try:
        fit(run)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}. {ways_on(run_dir)}") from None
    finally:
        say_through(None)


def _rounding(job: TrainJob, phases: list[PhaseSpan], own_step: int) -> list[Hook]:
    """Measure what rounding does where GEMMs of any phase are quantized and it is asked for."""
    interval = job.precision.statistics_interval
    jobs = [phase.job for phase in phases]
    if not interval or not any(quantizes(each.model, each.precision) for each in jobs):
        return []
    return [MeasureRounding(Path(job.run_dir), interval, max(own_step, 0))]


def _validation(job: TrainJob, run: Run, data: RunData) -> list[Hook]:
    if run.validation is None:
        return []
    baseline = (lambda: data.unigram_cross_entropy) if ranks.is_main() else (lambda: None)
    return [Validate(validation_interval(job), baseline)]


def _metrics(job: TrainJob, run: Run, data: RunData, peak: Peak) -> Hook:
    return LogMetrics(
        _trackers(job, run),
        Throughput(peak.flops, ranks.world_size()),
        batch_changes=ramps(job.train) or bool(job.train.phases),
        source_sizes={name: one.tokens for name, one in data.train.documents.items()},
    )


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


def _comparison(job: TrainJob) -> list[Hook]:
    if ranks.world_size() == 1 or job.recovery.straggler_interval == 0:
        return []
    return [CompareProcesses(job.recovery, Path(job.run_dir))]


def _say_summary(run_dir: Path, peak: str = "") -> None:
    print(summarise(run_dir, peak))  # noqa: T201  the result of the command
