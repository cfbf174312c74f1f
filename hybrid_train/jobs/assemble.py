"""Config sections -> objects: the only wiring of models, optimizers, objectives and checkpoints."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from hybrid_train.anatomy.layers import layers
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.megatron import read_weights
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.model.build import BuiltModel, build_model
from hybrid_train.model.hybrid import Hybrid
from hybrid_train.model.quantized import QuantizedProducts
from hybrid_train.model.translate import DTYPES
from hybrid_train.optim.groups import describe as describe_decay
from hybrid_train.optim.megatron import build_optimizer
from hybrid_train.parallel.groups import build_groups
from hybrid_train.runtime.seeds import start_tracker
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
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


def build_engine(
    job: TrainJob, built: BuiltModel, groups: ProcessGroupCollection, device: torch.device
) -> Engine:
    """Wire a model to its optimizer and objective."""
    pattern, routed = parse(job.model.pattern), _expert_layers(job.model)
    formatted = megatron.in_model_format(built.chunks, built.config)
    dtype = DTYPES[job.precision.base]
    quantized = None
    if built.backend is Backend.emulated:
        quantized = QuantizedProducts(built.chunks, job.train.seed, groups.tp_dp_cp)
        quantized.use(job.model, job.precision)
        quantized.keep_weights_in_fp8(job.model, job.precision)
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
        expert_layers=list(routed),
        num_experts=list(routed.values()),
        num_routers=sum(any(p.of_experts for p in one.parameters) for one in layers(job.model)),
        quantized=quantized,
    )


def _expert_layers(model: Model) -> dict[tuple[bool, int], int]:
    """Return the experts of each layer that has some: (in an MTP block, layer from 1) -> number."""
    return {
        (layer.depth > 0, layer.number): layer.sizes.experts
        for layer in layers(model)
        if any(one.of_experts for one in layer.parameters)
    }


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
