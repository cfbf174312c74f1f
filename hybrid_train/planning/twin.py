"""The twin of a run: its layout and its kinds of layers, as small as they can be.

Every degree that is above 1 becomes 2, and so does what is left for data parallelism as long as
there are at most eight processes. Each pipeline stage has one layer of each kind of the main part;
MTP keeps its layers and depths. What decides who talks to whom stays: the optimizer, overlap,
recomputation, tied embeddings, latent and shared experts. GEMMs are not quantized: a CPU would
share the scales of an emulated format among ranks, in calls that no GPU makes. A student learns the
next token instead: its teachers are of their true size.
"""

from dataclasses import fields, replace

from hybrid_train.planning.degrees import data_parallel, processes_unit
from hybrid_train.schema.model import Attention, LayerRule, Mamba, Mlp, Model
from hybrid_train.schema.objective import Distill, NextToken
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.pruning import Mask
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import Train, TrainJob

MOST_PROCESSES = 8
_LENGTH, _VOCABULARY, _HIDDEN, _INNER = 32, 64, 32, 32


def twin_of(job: TrainJob, processes: int) -> tuple[TrainJob, int]:
    """Return the twin of a checked run in one phase, and how many processes it has."""
    parallel = _small(job.parallel)
    unit = processes_unit(parallel)
    repeats = data_parallel(job.parallel, processes) > 1 and 2 * unit <= MOST_PROCESSES
    number = unit * (2 if repeats else 1)
    pattern = parse(job.model.pattern)
    stages = parallel.pipeline * parallel.virtual_pipeline
    kinds = "".join(dict.fromkeys(pattern.main))
    small = Pattern((kinds,) * stages, pattern.mtp, pattern.mtp_depths)
    sequences = data_parallel(parallel, number) * 2 * parallel.pipeline
    own = {one.name: getattr(job, one.name) for one in fields(TrainJob)}
    own |= {
        "train": Train(
            tokens=str(sequences * _LENGTH),
            sequence_length=_LENGTH,
            global_batch=sequences,
            seed=job.train.seed,
        ),
        "model": _small_model(job.model, small),
        "parallel": parallel,
        "precision": Precision(
            format=GemmFormat(job.precision.base.value),
            reduce_gradients_in_fp32=job.precision.reduce_gradients_in_fp32,
        ),
        "schedule": Schedule(peak_lr=1e-3),
        "edits": [one for one in job.edits if not isinstance(one, Mask)],  # of sizes that it lacks
        "runtime": Runtime(device=Device.cpu, kernels=Kernels.plain, threads=1),
    }
    if isinstance(job.objective, Distill):
        own["objective"] = NextToken(moe_aux_loss_scale=job.objective.moe_aux_loss_scale)
    return TrainJob(**own), number


def _small(parallel: Parallel) -> Parallel:
    """Return the layout with degrees of 1 and 2."""
    degrees = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    small = {name: min(2, getattr(parallel, name)) for name in degrees}
    own = parallel.expert_tensor
    return replace(parallel, **small, expert_tensor=None if own is None else min(2, own))


def _small_model(model: Model, pattern: Pattern) -> Model:
    """Return the model in its smallest sizes; layers of one kind are alike."""
    moe = model.moe
    return replace(
        model,
        pattern=str(pattern),
        hidden_size=_HIDDEN,
        vocab_size=_VOCABULARY,
        vocab_multiple=_VOCABULARY,
        attention=Attention(heads=4, kv_heads=4, head_dim=8),
        mamba=Mamba(heads=8, head_dim=8, state_size=8, groups=4, chunk_size=8),
        mlp=Mlp(intermediate_size=_INNER),
        moe=replace(
            moe,
            experts=4,
            top_k=min(2, moe.top_k),
            intermediate_size=_INNER,
            shared_intermediate_size=moe.shared_intermediate_size and _INNER,
            latent_size=moe.latent_size and _INNER // 2,
        ),
        layers=list[LayerRule](),
    )


def in_words(job: TrainJob, processes: int) -> str:
    """Say what the twin is."""
    parallel = job.parallel
    data = data_parallel(parallel, processes)
    return (
        f"{job.model.pattern} on {processes} processes: tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x context {parallel.context} x data {data}, expert {parallel.expert}"
    )
