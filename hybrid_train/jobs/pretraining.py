"""One training run from its checks to its summary, as one straight line."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hybrid_train.checkpoint import layout, store
from hybrid_train.checkpoint.megatron import read_weights
from hybrid_train.checkpoint.retention import drop_partial
from hybrid_train.config import compose
from hybrid_train.config.degrees import padded_vocab_size
from hybrid_train.config.problems import UserError
from hybrid_train.config.ramp import ramps
from hybrid_train.config.schema.data import Quickstart
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.config.units import show_tokens, tokens
from hybrid_train.data.build import DataBundle, build_data, check_data
from hybrid_train.jobs import run_folder
from hybrid_train.jobs.assemble import TOKENIZER, build_engine
from hybrid_train.model import counts, stages
from hybrid_train.model.build import build_model
from hybrid_train.parallel.groups import build_groups
from hybrid_train.runtime import ranks
from hybrid_train.runtime.logs import say_through
from hybrid_train.runtime.seeds import start_tracker
from hybrid_train.tracking.build import build_trackers
from hybrid_train.tracking.console import Console
from hybrid_train.tracking.jsonl import FILE_NAME
from hybrid_train.tracking.plots import plot_losses
from hybrid_train.tracking.summary import summarise
from hybrid_train.tracking.throughput import Peak, Throughput, peak_flops
from hybrid_train.tracking.tracker import FanOut
from hybrid_train.training.engine import Engine
from hybrid_train.training.hook import Hook, HookList
from hybrid_train.training.hooks.checkpointing import SaveCheckpoints, content_of
from hybrid_train.training.hooks.garbage import CollectGarbage
from hybrid_train.training.hooks.metrics import LogMetrics
from hybrid_train.training.hooks.stop import StopOnSignal
from hybrid_train.training.hooks.validation import Validate
from hybrid_train.training.loop import Run, fit
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
    start_tracker()
    groups = build_groups(job.parallel, job.runtime.timeout_s)
    data = _open_data(job, groups, state)
    engine = _build(job, groups, data, device)
    _restore(start, engine)
    engine.steps_done = state.step
    if ranks.is_main():
        compose.freeze(job, Path(job.run_dir))
        data.tokenizer.save(Path(job.run_dir) / TOKENIZER)
    run = Run(engine, data.train, tokens(job.train.tokens), state)
    peak = peak_flops(device, job.runtime.peak_tflops)
    stop = StopOnSignal()
    # The last hook: until the last save is done, a signal must not end the process.
    run.hooks = HookList([*_hooks(job, run, data, peak, start.own_step), stop])
    try:
        fit(run)
    finally:
        say_through(None)
    if ranks.is_main():
        _conclude(Path(job.run_dir), peak)
    if stop.signal is None:
        return 0
    _log.info("stopped by %s after a save; the same command goes on", stop.signal.name)
    return 128 + stop.signal


def _claim(job: TrainJob) -> Start:
    """Refuse what cannot run before anything is written, and find where to start."""
    run_dir = Path(job.run_dir)

    def check() -> None:
        check_data(job.data)
        run_folder.require_same_run(job)
        sizes = counts.parameters(job.model, job.model.vocab_size or _asked_vocab_size(job))
        run_folder.require_space(run_dir, sizes.total)
        for leftover in drop_partial(run_dir):
            _log.warning("removed %s, which an interrupted save left behind", leftover)

    ranks.main_first(check)
    own = layout.latest(run_dir)
    if own is not None:
        _log.info("going on from %s", own.path)
        return Start(own, is_own=True)
    if job.checkpoint.load is None:
        return Start(None)
    found = layout.locate(Path(job.checkpoint.load))
    run_folder.require_same_model(job, found)
    weights_only = job.checkpoint.load_only is not None
    _log.info("starting from %s of %s", "the weights" if weights_only else "all", found.path)
    return Start(found, weights_only)


def _asked_vocab_size(job: TrainJob) -> int:
    return job.data.vocab_size if isinstance(job.data, Quickstart) else 0


def _open_data(job: TrainJob, groups: ProcessGroupCollection, state: TrainState) -> DataBundle:
    data = build_data(
        job,
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        consumed_sequences=state.consumed_sequences,
        barrier=ranks.barrier,
        is_main=ranks.is_main(),
    )
    if job.model.vocab_size is None:
        job.model.vocab_size = data.vocab_size
    if job.model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size = {job.model.vocab_size}: the tokenizer has {data.vocab_size} "
            "tokens; leave model.vocab_size out to take its size"
        )
    for line in data.description:
        _log.info("%s", line)
    return data


def _build(
    job: TrainJob, groups: ProcessGroupCollection, data: DataBundle, device: torch.device
) -> Engine:
    assert job.model.vocab_size is not None
    built = build_model(job, groups, job.model.vocab_size, on_gpu=device.type == "cuda")
    size = counts.parameters(job.model, _rows(job))
    _log.info(
        "model: %s parameters, %s active, pattern %s, %s on %s",
        show_tokens(size.total),
        show_tokens(size.active),
        job.model.pattern,
        job.precision.format.value,
        device,
    )
    if job.parallel.pipeline > 1:
        for line in stages.describe(stages.stages(job, _rows(job))):
            _log.info("  %s", line)
    for part, kernels in built.kernels.items():
        _log.info("  %s: %s", part, kernels)
    return build_engine(job, built, groups, device)


def _rows(job: TrainJob) -> int:
    assert job.model.vocab_size is not None
    return padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)


def _restore(start: Start, engine: Engine) -> None:
    if start.found is None:
        return
    if start.weights_only:
        read_weights(start.found.path, engine.chunks, engine.groups)
        engine.optimizer.reload_model_params()
    else:
        store.load(start.found, content_of(engine))


def _hooks(job: TrainJob, run: Run, data: DataBundle, peak: Peak, own_step: int) -> list[Hook]:
    """List what reacts to the loop; first those that add to the report of a step."""
    speed = Throughput(
        counts.flops_per_token(job.model, _rows(job), job.train.sequence_length).training,
        peak.flops,
        ranks.world_size(),
    )
    hooks: list[Hook] = []
    if data.validation is not None:
        baseline = (lambda: data.unigram_cross_entropy) if ranks.is_main() else (lambda: None)
        hooks.append(Validate(data.validation, job.train.validation_interval, baseline))
    hooks.append(LogMetrics(_trackers(job, run), speed, batch_grows=ramps(job.train)))
    hooks.append(CollectGarbage())
    hooks.append(SaveCheckpoints(job.checkpoint, Path(job.run_dir), own_step))
    return hooks


def _trackers(job: TrainJob, run: Run) -> FanOut:
    """Open the trackers; on the main process only, the others have none."""
    if not ranks.is_main():
        return FanOut()
    trackers = build_trackers(job.tracking, Path(job.run_dir), run.state.step, compose.to_dict(job))
    console = Console(run.token_budget, run.state.tokens, job.tracking.console_interval)
    say_through(console.say)
    return FanOut([*trackers, console])


def _conclude(run_dir: Path, peak: Peak) -> None:
    plot_losses(run_dir / FILE_NAME, run_dir / "plots" / "loss.png")
    _say_summary(run_dir, peak.source)


def _say_summary(run_dir: Path, peak: str = "") -> None:
    print(summarise(run_dir, peak))  # noqa: T201  the result of the command
