"""The builder of phases: model and optimizer on the layout of each phase, and its data."""

import dataclasses
import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.gemm_formats import fp8_primary_weights
from hybrid_train.checkpoint import layout, store
from hybrid_train.data.loader import BatchSource
from hybrid_train.data.run_data import RunData
from hybrid_train.distillation.teacher_record import ChosenTeacher, forward_flops
from hybrid_train.jobs.networks import build_engine
from hybrid_train.megatron.data_parallel import ProcessGroups, build_groups, destroy_groups
from hybrid_train.model.build import build_model
from hybrid_train.planning import stages
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import show_tokens
from hybrid_train.training.engine import Engine
from hybrid_train.training.hooks.checkpointing import SaveCheckpoints, content_of
from hybrid_train.training.loop import Run, TrainState
from hybrid_train.training.network import Rate

_log = logging.getLogger(__name__)


@dataclass
class PhaseBuilder:
    """Builds what a phase needs; every process makes the same calls.

    Attributes:
        data: what the run reads from.
        device: of this process.
        run_dir: the run folder, through which a run moves to another layout.
        teachers: that run ahead of the model.
    """

    data: RunData
    device: torch.device
    run_dir: Path
    teachers: Sequence[ChosenTeacher] = ()

    def build(self, phase_span: PhaseSpan, state: TrainState, token_budget: int) -> Run:
        """Build a run at a position in a phase, with new weights."""
        groups = _groups_of(phase_span.job)
        engine = _engine(phase_span.job, groups, self.data, self.device)
        engine.steps_done = state.step
        run = Run(engine, self._batches(phase_span, engine, state), token_budget, state=state)
        self._bring_into(run, phase_span)
        return run

    def enter(
        self, run: Run, phase_span: PhaseSpan, before: PhaseSpan, saving: SaveCheckpoints
    ) -> None:
        """Bring a run from one phase into the next."""
        _log.info("phase %s begins at %s tokens", phase_span.name, show_tokens(run.state.tokens))
        # Layers that cannot be told to multiply in another way are built anew, and so are weights
        # that were kept in FP8 and no longer are.
        other_formats = phase_span.job.precision != before.job.precision
        fixed = run.engine.network.quantized is None
        kept, kept_before = (
            fp8_primary_weights(one.job.model, one.job.precision) for one in (phase_span, before)
        )
        anew = (other_formats and fixed) or kept != kept_before
        if phase_span.job.parallel != before.job.parallel or anew:
            self._move(run, phase_span, saving)
        self._bring_into(run, phase_span)
        state = run.batches.state_dict()
        run.batches = self._batches(phase_span, run.engine, run.state)
        run.batches.load_state_dict(state)

    def _move(self, run: Run, phase_span: PhaseSpan, saving: SaveCheckpoints) -> None:
        """Build the run anew on another layout, from a checkpoint of this very step."""
        saving.save_now(run)
        found = layout.latest(self.run_dir)
        assert found is not None, "it was just saved"
        del run.engine
        gc.collect()  # models are full of cycles, and two of them may not fit
        destroy_groups()
        groups = _groups_of(phase_span.job)
        engine = _engine(phase_span.job, groups, self.data, self.device)
        store.load(found, content_of(engine))
        engine.steps_done = run.state.step
        engine.objective.load_state_dict(run.state.objective)
        run.engine = engine

    def _bring_into(self, run: Run, phase_span: PhaseSpan) -> None:
        """Set what depends on the phase but not on the layout."""
        job, groups = phase_span.job, run.engine.network.groups
        for name, model in job.objective.models(job.model).items():
            quantized = run.engine.networks[name].quantized
            if quantized is not None:
                quantized.use(model, job.precision)
        sources = tuple(self.data.names)
        run.engine = dataclasses.replace(in_phase(run.engine, phase_span), sources=sources)
        run.validation = self.data.validation(
            phase_span, data_rank=groups.dp.rank(), data_size=groups.dp.size()
        )
        length = job.train.sequence_length
        rows = rows_of(job.model)
        run.flops_per_token = counts.flops_per_token(job.model, rows, length).training
        run.flops_per_token += forward_flops(self.teachers, job, rows)

    def _batches(self, phase_span: PhaseSpan, engine: Engine, state: TrainState) -> BatchSource:
        groups = engine.network.groups
        usual = self.data.loader(
            phase_span,
            data_rank=groups.dp.rank(),
            data_size=groups.dp.size(),
            tokens_seen=state.tokens,
        )
        return engine.objective.batches(usual)


def in_phase(engine: Engine, phase_span: PhaseSpan) -> Engine:
    """Return the engine with the batch and the sequence of a phase; its networks get the rate."""
    train, offset = phase_span.job.train, phase_span.start - phase_span.rate_start
    for network in engine.networks.values():
        network.rate = Rate(phase_span.schedule, phase_span.rate_tokens, offset)
    return dataclasses.replace(
        engine,
        microbatch=train.microbatch,
        sequences_per_step=train.global_batch,
        sequence_length=train.sequence_length,
    )


def rows_of(model: Model) -> int:
    """Return the rows of the embedding, padding included."""
    assert model.vocab_size is not None, "the data was opened before"
    return padded_vocab_size(model.vocab_size, model.vocab_multiple)


def _groups_of(job: TrainJob) -> ProcessGroups:
    return build_groups(job.parallel, job.runtime.timeout_s, job.gpu)


def _engine(job: TrainJob, groups: ProcessGroups, data: RunData, device: torch.device) -> Engine:
    assert job.model.vocab_size is not None
    built = build_model(job, groups, job.model.vocab_size, on_gpu=device.type == "cuda")
    size = counts.parameters(job.model, rows_of(job.model))
    _log.info(
        "model: %s parameters, %s active, pattern %s, %s on %s",
        show_tokens(size.total),
        show_tokens(size.active),
        job.model.pattern,
        job.precision.format.value,
        device,
    )
    if job.model.moe.top_k == 1 and parse(job.model.pattern).count("E"):
        _log.info(
            "  routers: top_k = 1 gives the chosen expert the weight 1, whatever its score; they "
            "learn from the balance loss alone"
        )
    if job.parallel.pipeline > 1:
        for line in stages.describe(stages.stages(job, rows_of(job.model))):
            _log.info("  %s", line)
    for part, kernels in built.kernels.items():
        _log.info("  %s: %s", part, kernels)
    return build_engine(job, built, groups, device)
