"""Config sections -> objects: the only wiring of models, optimizers, objectives and checkpoints."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.megatron import read_weights
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.model.build import BuiltModel, build_model
from hybrid_train.model.edits import Edit, apply_edits
from hybrid_train.model.hybrid import Hybrid
from hybrid_train.model.quantized import QuantizedProducts
from hybrid_train.model.translate import DTYPES
from hybrid_train.optim.groups import describe as describe_decay
from hybrid_train.optim.megatron import build_optimizer
from hybrid_train.parallel.groups import build_groups
from hybrid_train.runtime.seeds import start_tracker
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import Backend, Precision, ProductFormat
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import tokens
from hybrid_train.training import megatron
from hybrid_train.training.engine import Engine
from hybrid_train.training.next_token import NextToken
from hybrid_train.training.nonfinite import raise_bad_norm

TOKENIZER = layout.TOKENIZER
_log = logging.getLogger(__name__)


def _quantize(
    job: TrainJob, built: BuiltModel, groups: ProcessGroupCollection
) -> QuantizedProducts | None:
    if built.backend is not Backend.emulated:
        return None
    return QuantizedProducts(job.model, job.precision, job.train.seed, groups.tp_dp_cp)


# Edits by name, each made from a job where the job asks for it; `Edit.stage` orders them.
EDITS: dict[str, Callable[[TrainJob, BuiltModel, ProcessGroupCollection], Edit | None]] = {
    "quantize": _quantize,
}


def build_engine(
    job: TrainJob, built: BuiltModel, groups: ProcessGroupCollection, device: torch.device
) -> Engine:
    """Wire a model to its optimizer and objective."""
    pattern = parse(job.model.pattern)
    formatted = megatron.in_model_format(built.chunks, built.config)
    dtype = DTYPES[job.precision.base]
    made = (make(job, built, groups) for make in EDITS.values())
    edits = [edit for edit in made if edit is not None]
    apply_edits(edits, built.chunks)
    quantized = next((one for one in edits if isinstance(one, QuantizedProducts)), None)
    chunks = megatron.wrap(formatted, built.config, job.parallel, job.precision)
    held = [pair for chunk in chunks for pair in chunk.named_parameters()]
    _log.info("%s", describe_decay(job.optimizer, held))
    return Engine(
        chunks=chunks,
        optimizer=build_optimizer(job.optimizer, job.parallel, chunks, dtype, raise_bad_norm),
        objective=NextToken(
            depths=pattern.mtp_depths,
            mtp_loss_scale=job.objective.mtp_loss_scale,
            context_group=groups.cp,
        ),
        finalizer=megatron.Finalizer(built.config),
        groups=groups,
        schedule=job.schedule,
        rate_offset=0,
        rate_tokens=tokens(job.train.tokens),
        device=device,
        microbatch=job.train.microbatch,
        sequences_per_step=job.train.global_batch,
        sequence_length=job.train.sequence_length,
        expert_layers=_expert_layers(pattern.main, pattern.mtp),
        num_experts=job.model.moe.experts,
        num_routers=_num_routers(pattern, repeated_block=job.model.mtp.repeated_block),
        quantized=quantized,
    )


def _num_routers(pattern: Pattern, *, repeated_block: bool) -> int:
    blocks = min(pattern.mtp_depths, 1) if repeated_block else pattern.mtp_depths
    return pattern.main.count("E") + blocks * (pattern.mtp or "").count("E")


def _expert_layers(main: str, mtp: str | None) -> list[tuple[bool, int]]:
    return [
        (in_mtp, layer)
        for in_mtp, letters in ((False, main), (True, mtp or ""))
        for layer, letter in enumerate(letters, start=1)
        if letter == "E"
    ]


@dataclass(frozen=True)
class LoadedModel:
    """A trained model on one process, ready to run."""

    model: Hybrid
    tokenizer: FolderTokenizer
    job: TrainJob
    run_dir: Path


def load_model(checkpoint: str, runtime: Runtime) -> LoadedModel:
    """Load the weights of a run, trained under whatever layout, into one process.

    Args:
        checkpoint: a run folder or one checkpoint of it.
        runtime: device and kernels; the process must be started.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    found = layout.locate(Path(checkpoint))
    job = frozen.load(found.run_dir)
    job.parallel = type(job.parallel)()
    job.model.pattern = job.model.pattern.replace("|", "")
    job.runtime = runtime
    # Of one token a product is not what a GPU quantizes, and no gradient asks for it.
    job.precision = Precision(format=ProductFormat(job.precision.base.value))
    tokenizer = open_tokenizer(found.run_dir / TOKENIZER)
    start_tracker()
    groups = build_groups(job.parallel, runtime.timeout_s)
    vocab_size = job.model.vocab_size or tokenizer.vocab_size
    built = build_model(job, groups, vocab_size, on_gpu=torch.cuda.is_available())
    read_weights(found.path, built.chunks, groups)
    _log.info("loaded %s, trained for %d steps", found.path, found.step)
    job.model.vocab_size = vocab_size
    return LoadedModel(built.chunks[0], tokenizer, job, found.run_dir)
