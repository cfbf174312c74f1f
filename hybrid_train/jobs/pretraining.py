"""One training run, from its claim to its summary.

claim     the folder, and where the run starts             jobs/run_start.py, run_folder.py
choose    its teachers, if it learns from any              jobs/chosen_teachers.py
open      its data; other data than before is refused      `open_run_data`, data/
attempt   is noted in the folder, and watched              jobs/attempts.py
build     networks, optimizer, objective of the phase      jobs/phase_builder.py
restore   weights, optimizer, position, if there are any   checkpoint/
hooks     what reacts to the loop                          `_hooks` lists them in their order
fit       until the tokens are spent, or it is stopped     training/loop.py
conclude  a plot and a summary                             tracking/
"""

import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_train.anatomy.gemm_formats import quantizes
from hybrid_train.checkpoint import store
from hybrid_train.checkpoint.copier import Copier
from hybrid_train.checkpoint.layout import TOKENIZER
from hybrid_train.compression.mask import keep_ranking
from hybrid_train.config import frozen, launcher
from hybrid_train.data.record import changes, read_record, record_of, write_record
from hybrid_train.data.run_data import RunData, open_data
from hybrid_train.distillation import teacher_record
from hybrid_train.distillation.targets import targets_of
from hybrid_train.distillation.teacher_record import ChosenTeacher
from hybrid_train.hf import origin
from hybrid_train.jobs import attempts, measurement, mirrored_run, provenance, run_folder
from hybrid_train.jobs.chosen_teachers import choose_teachers
from hybrid_train.jobs.phase_builder import PhaseBuilder
from hybrid_train.jobs.run_start import Start, claim, require_masks
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.planning.phases import (
    PhaseSpan,
    lay_out,
    phase_at,
    ramps,
    unread_sources,
    validation_interval,
)
from hybrid_train.runtime import ranks
from hybrid_train.runtime.logs import say_through
from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.tracking import history
from hybrid_train.tracking.console import Console, summarise
from hybrid_train.tracking.jsonl import FILE_NAME, read_metrics
from hybrid_train.tracking.metrics import losses_of
from hybrid_train.tracking.plots import plot_losses
from hybrid_train.tracking.throughput import Peak, Throughput, peak_flops
from hybrid_train.tracking.trackers import FanOut, build_trackers
from hybrid_train.training.bad_steps import BadSteps, NonFiniteError
from hybrid_train.training.hooks.checkpointing import (
    CopyCheckpoints,
    EnterPhases,
    Recover,
    SaveCheckpoints,
    content_of,
    load_weights,
    ways_on,
)
from hybrid_train.training.hooks.processes import (
    CaptureGraphs,
    CollectGarbage,
    CompareProcesses,
    CompareReplicas,
    StopOnSignal,
)
from hybrid_train.training.hooks.profiling import profiling_hooks
from hybrid_train.training.hooks.reporting import AskTasks, LogMetrics, Validate
from hybrid_train.training.hooks.rounding import AuditPrecision, MeasureRounding
from hybrid_train.training.loop import Hook, HookList, Run, TrainState, fit

_log = logging.getLogger(__name__)


def train(job: TrainJob, device: torch.device) -> int:
    """Run a checked job; return 0, or 128 + signal if a signal stopped it after a save."""
    start = claim(job)
    teachers = choose_teachers(job, goes_on=start.is_own)
    if start.found and start.state().tokens >= tokens(job.train.tokens):
        _log.info(
            "%s is complete: %d tokens of train.tokens=%s; a larger train.tokens trains on",
            *(start.found.run_dir, start.state().tokens, job.train.tokens),
        )
        if start.is_own:
            mirrored_run.copy_complete(job.checkpoint, Path(job.run_dir))
            if ranks.is_main():
                _say_summary(Path(job.run_dir))
        return 0
    with contextlib.closing(StopOnSignal(job.recovery.time_limit_s)) as stop:
        _attempt(job, device, start, teachers, stop)
    outcome, _, cause, _ = stop.how_it_ended()
    if outcome == history.STOPPED:
        _log.info("%s; the same command goes on", cause)
    return 0 if stop.signal is None else _exit_code(stop.signal)


def _exit_code(number: signal.Signals) -> int:
    """Return 128 + signal; 0 under torchrun after SIGUSR1, which would start the run again."""
    asked_by_launcher = number is signal.SIGUSR1 and launcher.by_torchrun()
    return 0 if asked_by_launcher else 128 + number


def _attempt(
    job: TrainJob,
    device: torch.device,
    start: Start,
    teachers: Sequence[ChosenTeacher],
    stop: StopOnSignal,
) -> None:
    """Open the data, refuse what cannot go on, and train; the history says how it ended."""
    run_dir, state, phases = Path(job.run_dir), start.state(), lay_out(job)
    data = open_run_data(job, phases, start)
    teacher_record.require_usable(
        teachers, [one.job for one in phases], data.tokenizer, ranks.world_size()
    )
    ranks.run_on_main_first(lambda: require_masks(job, start))
    record = same_data(job, data, state) if start.is_own else record_of(data)
    with attempts.attempt(run_dir, state.step, job.runtime.hang_timeout_s) as attempt:
        if ranks.is_main():
            run_folder.take_over(job)
            frozen.freeze(job, run_dir)
            write_record(run_dir, record)
            teacher_record.write_record(run_dir, teachers)
            provenance.write_lineage(job, start.found, teachers, goes_on=start.is_own)
            data.tokenizer.save(run_dir / TOKENIZER)
            if not start.is_own:
                origin.pass_on(start.found.run_dir if start.found else None, run_dir)
        if not start.is_own:
            ranks.run_on_main_first(lambda: keep_ranking(job, run_dir))
        builder = PhaseBuilder(data, device, run_dir, teachers)
        run = builder.build(phase_at(phases, state.tokens), state, tokens(job.train.tokens))
        restore(start, run)
        run.bad_steps = bad_steps(job, start, phase_at(phases, state.tokens).start)
        peak = peak_flops(device, job.runtime.peak_tflops)
        copier = mirrored_run.start_copier(job.checkpoint, run_dir)
        hooks = _hooks(job, run, builder, phases, start.own_step, peak, copier)
        run.hooks = HookList([*hooks, stop])
        _fit(run, run_dir)
        if ranks.is_main():
            plot_losses(run_dir / FILE_NAME, run_dir / "plots" / "loss.png", run_dir.resolve().name)
            _say_summary(run_dir, peak.source)
            attempt.end(*stop.how_it_ended())
        if copier is not None:
            copier.close()


def _hooks(
    job: TrainJob,
    run: Run,
    builder: PhaseBuilder,
    phases: list[PhaseSpan],
    own_step: int,
    peak: Peak,
    copier: Copier | None,
) -> list[Hook]:
    """List what reacts to the loop, in the order in which it does."""
    run_dir = builder.run_dir
    failed_saves = job.recovery.max_failed_saves
    saving = SaveCheckpoints(job.checkpoint, run_dir, own_step, failed_saves, copier)
    copies = [CopyCheckpoints(saving, run_dir, job.checkpoint.keep, copier)]

    def enter(run: Run, phase: PhaseSpan, before: PhaseSpan) -> None:
        builder.enter(run, phase, before, saving)
        run.bad_steps.forget()

    return [
        *profiling_hooks(job.profile, run_dir),
        EnterPhases(phases, enter),
        # These add to the report of a step, of which the trackers are told after them.
        AuditPrecision(run_dir, lambda seen: phase_at(phases, seen).job),
        *_rounding(job.precision.statistics_interval, phases, run_dir, own_step),
        *_validation(job, phases, run, builder.data, is_new=own_step < 0),
        *_evaluation(job, phases, builder.data),
        *built_from(job.hooks),
        _metrics(job, run, builder.data, peak),
        CollectGarbage(job.runtime.gc_interval),
        CaptureGraphs(job.gpu),
        *_checksums(job.recovery),
        *_comparison(job.recovery, run_dir),
        # A run that goes back is not saved where it was.
        Recover(job.recovery, run_dir, saving.settle),
        saving,
        *(copies if job.checkpoint.url else []),
    ]


def _fit(run: Run, run_dir: Path) -> None:
    try:
        fit(run)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}. {ways_on(run_dir)}") from None
    finally:
        say_through(None)


def _rounding(interval: int, phases: list[PhaseSpan], run_dir: Path, own_step: int) -> list[Hook]:
    """Measure what rounding does where GEMMs of any phase are quantized and it is asked for."""
    jobs = [phase.job for phase in phases]
    if not interval or not any(quantizes(each.model, each.precision) for each in jobs):
        return []
    return [MeasureRounding(run_dir, interval, max(own_step, 0))]


def _validation(
    job: TrainJob, phases: list[PhaseSpan], run: Run, data: RunData, *, is_new: bool
) -> list[Hook]:
    if run.validation is None:
        return []
    baseline = (lambda: data.unigram_cross_entropy) if ranks.is_main() else (lambda: None)
    interval = validation_interval(job.train.validation_interval, phases)
    return [Validate(interval, baseline, at_start=is_new and job.train.validate_start)]


def _evaluation(job: TrainJob, phases: list[PhaseSpan], data: RunData) -> list[Hook]:
    interval = job.evaluate.interval
    return [AskTasks(interval, measurement.in_training(job, phases, data))] if interval else []


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


def _checksums(recovery: Recovery) -> list[Hook]:
    if ranks.world_size() == 1 or recovery.checksum_interval == 0:
        return []
    return [CompareReplicas(recovery.checksum_interval)]


def _comparison(recovery: Recovery, run_dir: Path) -> list[Hook]:
    if ranks.world_size() == 1 or recovery.straggler_interval == 0:
        return []
    return [CompareProcesses(recovery, run_dir)]


def _say_summary(run_dir: Path, peak: str = "") -> None:
    print(summarise(run_dir, peak))  # noqa: T201  the result of the command


def open_run_data(job: TrainJob, phase_spans: list[PhaseSpan], start: Start) -> RunData:
    """Open the data of a run, and give the job and its phases the vocabulary.

    Raises:
        UserError: if the tokenizer has more tokens than the model.
    """
    stored = targets_of(job.objective)
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        data = open_data(
            job.data,
            phase_spans,
            [*built_from(job.row_transforms), *stored],
            barrier=ranks.barrier,
            is_main=ranks.is_main(),
            report=shown.update,
        )
    if job.model.vocab_size is None:
        # Weights keep their vocabulary, also where another one would fit into the same padding.
        loaded = frozen.load(start.found.run_dir).model.vocab_size if start.found else None
        for phase_job in (job, *(phase_span.job for phase_span in phase_spans)):
            phase_job.model.vocab_size = loaded or data.vocab_size
    assert job.model.vocab_size is not None
    if unread := unread_sources(job.data, job.train.phases):
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
    for targets in stored:
        targets.require_fits(phase_spans, record_of(data))
    for line in data.description():
        _log.info("%s", line)
    return data


def same_data(job: TrainJob, data: RunData, state: TrainState) -> dict[str, Any]:
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
        error.on_all_ranks = True
        raise error
    for line in found:
        _log.warning("%s; accepted", line)
    if found and ranks.is_main():
        history.note(run_dir, "data changed", step=state.step, changes=found)
    return now


def restore(start: Start, run: Run) -> None:
    """Load what a run starts from: weights alone, or all that belongs to its position."""
    engine = run.engine
    if start.found is None:
        return
    if start.weights_only:
        load_weights(start.found.path, engine)
    else:
        store.load(start.found, content_of(engine))
        run.batches.load_state_dict(run.state.batches)
        engine.objective.load_state_dict(run.state.objective)


def bad_steps(job: TrainJob, start: Start, phase_start: int) -> BadSteps:
    """Go on to judge losses with those that a run that goes on has had in this phase."""

    def before() -> list[dict[str, float]]:
        path = Path(job.run_dir) / FILE_NAME
        lines = read_metrics(path) if start.is_own and path.exists() else []
        known = (line for line in lines if line["step"] <= start.own_step)
        return [line for line in known if line["tokens"] > phase_start]

    lines = ranks.broadcast_from_main(lambda: before()[-2 * job.recovery.spike_window :])
    return BadSteps(job.recovery, lines)
