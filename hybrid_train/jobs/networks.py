"""Networks and objective of a job: new and trained, or loaded from a run and frozen."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_train.anatomy.layers import layers
from hybrid_train.anatomy.selection import Selection
from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.save_load import read_weights
from hybrid_train.compression.mask import Mask
from hybrid_train.config import checks, frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.distillation import teacher_record
from hybrid_train.distillation.hidden_states import AddProjections
from hybrid_train.megatron import data_parallel
from hybrid_train.megatron.data_parallel import ProcessGroups, build_groups
from hybrid_train.megatron.forward_backward import Finalizer
from hybrid_train.megatron.hybrid import Hybrid, limit_vocabulary
from hybrid_train.megatron.optimizers import build_optimizer
from hybrid_train.megatron.step_graphs import StepGraph, captures_steps
from hybrid_train.megatron.transformer_config import DTYPES
from hybrid_train.model.build import BuiltModel, build_model
from hybrid_train.model.edits import Edit, Freeze, apply_edits
from hybrid_train.model.quantized import QuantizedGemms
from hybrid_train.optim.groups import describe as describe_decay
from hybrid_train.runtime import ranks
from hybrid_train.schema.extension import implementation_of
from hybrid_train.schema.gpu import CudaGraphs
from hybrid_train.schema.model import Model
from hybrid_train.schema.names import nearest
from hybrid_train.schema.objective import MAIN, Distill
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Backend, GemmFormat, Precision
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.pruning import EDITS as LISTED
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, tokens
from hybrid_train.training.bad_steps import raise_bad_norm
from hybrid_train.training.engine import Engine
from hybrid_train.training.network import ExpertLayer, Network, Rate, Routing
from hybrid_train.training.objective import Given, Objective

_log = logging.getLogger(__name__)


def build_engine(
    job: TrainJob, built: BuiltModel, groups: ProcessGroups, device: torch.device
) -> Engine:
    """Give a job what its steps need: networks and objective.

    Args:
        job: a checked job.
        built: the model of its own section; those that the objective adds are built here.
        groups: processes of its layout.
        device: of this process.

    Raises:
        UserError: if the objective cannot be imported, or is not one.
    """
    networks = {}
    for number, (name, model) in enumerate(job.objective.models(job.model).items()):
        own, made = job, built
        if model is not job.model:
            # Two networks of one shape must not begin alike, nor round alike.
            train = dataclasses.replace(job.train, seed=job.train.seed + number)
            own = dataclasses.replace(job, model=model, train=train)
            assert model.vocab_size is not None, f"{name} has no vocabulary"
            made = build_model(own, groups, model.vocab_size, on_gpu=device.type == "cuda")
        networks[name] = build_network(own, made, groups, device, name)
    return Engine(
        networks=networks,
        objective=build_objective(job, networks, groups),
        microbatch=job.train.microbatch,
        sequences_per_step=job.train.global_batch,
        sequence_length=job.train.sequence_length,
    )


def build_objective(
    job: TrainJob, networks: Mapping[str, Network], groups: ProcessGroups
) -> Objective:
    """Build what the settings of the objective name.

    Raises:
        UserError: if that cannot be imported, or its turns ask for what is not there.
    """
    implementation = implementation_of(job.objective)
    given = Given(networks, groups, job.model, Path(job.run_dir), teacher_loader(job, groups))
    objective: Objective = implementation(job.objective, given)
    turns = objective.turns
    if unknown := {turn.network for turn in turns} - networks.keys():
        raise _refused(
            f"objective {job.objective.kind}: it trains {', '.join(sorted(unknown))}, but its "
            f"networks are {', '.join(networks)}"
        )
    if len(turns) > 1 and (job.parallel.fsdp or job.precision.fp8_param_gather):
        raise _refused(
            f"objective {job.objective.kind}: a step of {len(turns)} turns takes back updates, "
            "which parallel.fsdp=true and precision.fp8_param_gather=true do not let it do; set "
            "both to false"
        )
    return objective


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process builds the same objective
    return error


def build_network(
    job: TrainJob,
    built: BuiltModel,
    groups: ProcessGroups,
    device: torch.device,
    name: str = MAIN,
) -> Network:
    """Wrap a model and give it an optimizer, a learning rate and records of its own."""
    formatted = data_parallel.in_model_format(built.chunks, built.config)
    made = (make(job, built, groups) for make in EDITS.values())
    edits = [edit for edit in made if edit is not None]
    edits += _listed_edits(job, Path(job.run_dir), built)
    apply_edits(edits, built.chunks)
    quantized = next((one for one in edits if isinstance(one, QuantizedGemms)), None)
    left = _left_by(edits)
    chunks = data_parallel.wrap(
        *(formatted, built.config, job.parallel, job.precision),
        nccl_user_buffers=job.gpu.nccl_user_buffers,
    )
    held = [pair for chunk in chunks for pair in chunk.named_parameters()]
    _log.info("%s", describe_decay(job.optimizer, held))
    dtype = DTYPES[job.precision.base]
    return Network(
        chunks=chunks,
        groups=groups,
        device=device,
        routing=_routing(job.model, left),
        balance_losses=built.balance_losses,
        quantized=quantized,
        left=left,
        name=name,
        optimizer=build_optimizer(job.optimizer, job.parallel, chunks, dtype, raise_bad_norm),
        rate=Rate(job.schedule, tokens(job.train.tokens)),
        finalizer=Finalizer(built.config),
        step_graph=(
            StepGraph(job.gpu.cuda_graph_warmup_steps) if captures_steps(built.config) else None
        ),
    )


def _quantize(job: TrainJob, built: BuiltModel, groups: ProcessGroups) -> QuantizedGemms | None:
    if built.backend is not Backend.emulated:
        return None
    return QuantizedGemms(job.model, job.precision, job.train.seed, groups.tp_dp_cp)


def _project(job: TrainJob, _: BuiltModel, __: ProcessGroups) -> AddProjections | None:
    """Give a student whose hidden states are drawn to a teacher's the projections for it."""
    settings = job.objective
    if not isinstance(settings, Distill) or not settings.hidden.layers:
        return None
    recorded = teacher_record.read_record(Path(job.run_dir))
    teacher = (recorded or teacher_record.choose(job, goes_on=False))[0]
    return AddProjections(settings.hidden, frozen.load(Path(teacher.run_dir)).model.hidden_size)


def _freeze_mtp(job: TrainJob, _: BuiltModel, __: ProcessGroups) -> Freeze | None:
    """Keep MTP blocks as they are that are to learn nothing."""
    return None if job.objective.trains_mtp else Freeze("mtp.")


# Edits that follow from other settings of a job, by name; `Edit.stage` orders them all.
EDITS: dict[str, Callable[[TrainJob, BuiltModel, ProcessGroups], Edit | None]] = {
    "quantize": _quantize,
    "project": _project,
    "freeze_mtp": _freeze_mtp,
}


def _listed_edits(job: TrainJob, run_dir: Path, built: BuiltModel) -> list[Edit]:
    """Build the edits that a job lists: a user's own of their settings, ours of the run, too."""
    given = job, run_dir, built.chunks[0].num_tokens
    return [
        implementation_of(one)(one, *(given if one.kind in LISTED else ())) for one in job.edits
    ]


def _left_by(edits: Sequence[Edit]) -> Selection | None:
    """Return what a mask among the edits leaves of the model; None where there is none."""
    return next((one.selection for one in edits if isinstance(one, Mask)), None)


def _routing(model: Model, left: Selection | None) -> Routing:
    routed = [one for one in layers(model) if any(p.of_experts for p in one.parameters)]
    expert_layers = tuple(
        ExpertLayer(one.depth > 0, one.number, one.sizes.experts, one.sizes.experts)
        for one in routed
        if one.depth <= 1  # blocks are alike, and share their records
    )
    routing = Routing(expert_layers, len(routed))
    return routing if left is None else routing.masked(left)


def teacher_loader(
    job: TrainJob, groups: ProcessGroups
) -> Callable[[str, GemmFormat | None], Network]:
    """Return what loads a network from a run onto the layout of a job."""
    # The buffers of this overlap are of one size, and they are the student's.
    parallel = dataclasses.replace(job.parallel, overlap_tensor=False)

    def load(checkpoint: str, format: GemmFormat | None) -> Network:
        loaded = load_model(
            checkpoint, job.runtime, parallel=parallel, groups=groups, format=format
        ).network
        if job.model.vocab_size is not None:
            limit_vocabulary(loaded.chunks, job.model.vocab_size)
        return loaded

    return load


@dataclass(frozen=True)
class LoadedModel:
    """A trained model on some layout, frozen, and the run that it is of."""

    network: Network
    job: TrainJob
    run_dir: Path

    @property
    def model(self) -> Hybrid:
        """The model itself, where one process holds all of it."""
        (chunk,) = self.network.chunks
        assert isinstance(chunk, Hybrid)
        return chunk

    @functools.cached_property
    def tokenizer(self) -> FolderTokenizer:
        """That of the run."""
        return open_tokenizer(self.run_dir / layout.TOKENIZER)


def load_model(
    checkpoint: str,
    runtime: Runtime,
    *,
    parallel: Parallel | None = None,
    groups: ProcessGroups | None = None,
    format: GemmFormat | None = None,
    network: str | None = None,
) -> LoadedModel:
    """Load the weights of a run, trained under whatever layout, into any layout.

    Every process calls this; they must be started.

    Args:
        checkpoint: a run folder or one checkpoint of it.
        runtime: device and kernels.
        parallel: the layout; None: all of the model in one process.
        groups: of that layout, in a run that has built them; None: they are built.
        format: of weights and activations; None: that of the run's weights.
        network: which one of a run that trained several; None: its first.

    Raises:
        UserError: if there is no complete checkpoint, no such network in it, or the layout that is
            to be built does not fit model and processes.
    """
    found = layout.locate(Path(checkpoint))
    job = frozen.load(found.run_dir)
    if job.model.vocab_size is None:
        job.model.vocab_size = open_tokenizer(found.run_dir / layout.TOKENIZER).vocab_size
    name, key, job.model = _network_of(job, network, found.path)
    job.parallel, job.runtime = parallel or Parallel(), runtime
    # A captured graph is of passes of one shape, and of a training step.
    job.gpu = dataclasses.replace(job.gpu, cuda_graphs=CudaGraphs.none, cuda_graph_parts=None)
    # A GPU does not quantize the GEMMs of a single token, and no gradient asks for them.
    job.precision = Precision(format=format or GemmFormat(job.precision.base.value))
    if groups is None:
        _require_split(job)
        groups = build_groups(job.parallel, runtime.timeout_s)
    assert job.model.vocab_size is not None
    built = build_model(job, groups, job.model.vocab_size, on_gpu=torch.cuda.is_available())
    read_weights(found.path, built.chunks, groups, key)
    # What an edit makes of weights is not in them: without it this would be another model.
    edits = _listed_edits(job, found.run_dir, built)
    apply_edits(edits, built.chunks)
    left = _left_by(edits)
    _log.info("loaded %s, trained for %s", found.path, counted(found.step, "step"))
    device = torch.device(torch.cuda.current_device())
    loaded = Network(
        list(built.chunks), groups, device, _routing(job.model, left), built.balance_losses,
        left=left, name=name,
    )  # fmt: skip
    loaded.freeze()
    return LoadedModel(loaded, job, found.run_dir)


def _require_split(job: TrainJob) -> None:
    """Refuse a layout that the model cannot be split into.

    Raises:
        ConfigError: on all processes.
    """
    if problems := list(checks.split_problems(job, ranks.world_size())):
        error = ConfigError(problems)
        error.on_all_ranks = True
        raise error


def _network_of(job: TrainJob, wanted: str | None, checkpoint: Path) -> tuple[str, str, Model]:
    """Return name, name in the keys of the checkpoint, and model of a network, without cuts."""
    models = job.objective.models(job.model)
    name = next(iter(models)) if wanted is None else wanted
    if name not in models:
        hint = nearest(name, models)
        raise UserError(
            f"{checkpoint} has no network {name!r}; it has {', '.join(models)}"
            + (f"; nearest: {hint}" if hint else "")
        )
    pattern = models[name].pattern.replace("|", "")
    return name, name if len(models) > 1 else "", dataclasses.replace(models[name], pattern=pattern)
