"""Rules about the layout: degrees, stages and processes, and what trades time for memory.

Rules of a layer kind apply only where the pattern has it. Where a comment names a file, it is one
of Megatron-Core 0.19.2.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hybrid_train.anatomy.axes import Axis, Sizes, sizes_of
from hybrid_train.anatomy.kinds import Parameter, mtp_block
from hybrid_train.anatomy.layers import distinct, mtp_blocks
from hybrid_train.config import rules_of_cluster
from hybrid_train.planning import degrees
from hybrid_train.schema.cluster import processes_per_node
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.job_roots import CheckJob, SubmitJob
from hybrid_train.schema.objective import Distill
from hybrid_train.schema.optimizer import GradientFormat, MasterFormat, MomentFormat
from hybrid_train.schema.parallel import Recompute, RecomputeMethod, RecomputeModule
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.precision import NumberFormat
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.tracking import ProfileTool
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

_DEGREES = tuple(
    f"parallel.{name}" for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
)
# Of the formats beside float32 that a moment may be kept in.
_FRACTION_BITS = {MomentFormat.bfloat16: 7, MomentFormat.float16: 10, MomentFormat.float8: 3}


def _stages_match_the_pattern(job: TrainJob, _: int) -> Iterator[Problem]:
    # Without cuts of the user's own the layers are cut by their cost (planning/stages.py).
    plan, pattern = job.parallel, _pattern(job)
    stages = plan.pipeline * plan.virtual_pipeline
    if plan.virtual_pipeline > 1 and plan.pipeline == 1:
        rule = "needs parallel.pipeline > 1"
        yield Problem("parallel.virtual_pipeline", plan.virtual_pipeline, rule, 1)
    elif stages > len(pattern.main):
        name = "pipeline" if plan.pipeline > len(pattern.main) else "virtual_pipeline"
        rule = (
            f"makes {stages} stages of {counted(len(pattern.main), 'main layer')}; each needs one"
        )
        yield Problem(f"parallel.{name}", getattr(plan, name), rule)
    elif pattern.is_cut and len(pattern.stages) != stages:
        rule = (
            f"has {counted(len(pattern.stages), 'stage')}; pipeline x virtual_pipeline is {stages}"
        )
        uncut = pattern.cut([len(pattern.main)])
        yield Problem("model.pattern", job.model.pattern, rule, str(uncut))


def _pattern(job: TrainJob) -> Pattern:
    return parse(job.model.pattern)


def _tensor_splits_every_layer(job: TrainJob, _: int) -> Iterator[Problem]:
    sizes, settings = {}, {}
    for layer in distinct(job.model):
        dense = (one for one in layer.parameters if not one.of_experts)
        for one in _split_sizes(dense, layer.sizes):
            setting = layer.setting(one.axis)
            name = one.words or setting
            if one.words and layer.rule is not None:
                name += f" of layer {layer.number}"
            sizes[name], settings[name] = one.size, setting
    if mtp_blocks(job.model):
        sizes_of_model = sizes_of(job.model)
        for one in _split_sizes(mtp_block(sizes_of_model), sizes_of_model):
            sizes[one.axis.setting] = one.size
    yield from _divides("parallel.tensor", job.parallel.tensor, sizes, settings)


@dataclass(frozen=True)
class _Split:
    """A size that ranks must divide: what it is, and the axis whose setting changes it."""

    words: str
    size: int
    axis: Axis


def _split_sizes(tensors: Iterable[Parameter], sizes: Sizes) -> Iterator[_Split]:
    """Yield what ranks must divide of the dimensions that they split.

    Each part of a dimension is split along its first axis. Where parts alternate, that is of their
    rows in all: the axis that they alternate by may be shorter than the ranks are many.
    """
    for one in tensors:
        if one.split is None:
            continue
        whole = one.dims[one.split]
        for part in whole.parts:
            axis = part.axes[0]
            if axis is not whole.by:
                yield _Split("", sizes.along(axis), axis)
        if whole.by and whole.free:
            yield _Split(whole.words, whole.size(sizes), whole.free)


def _divides(
    path: str, degree: int, sizes: dict[str, int], settings: dict[str, str] | None = None
) -> Iterator[Problem]:
    """Yield a problem that names each size that a degree does not divide.

    Args:
        path: of the degree.
        degree: its value.
        sizes: by name.
        settings: whose they are, where that is not the name.
    """
    uneven = {name: size for name, size in sizes.items() if size % degree}
    if uneven:
        *others, last = (f"{name} ({size})" for name, size in uneven.items())
        named = f"{', '.join(others)} and {last}" if others else last
        whole = math.gcd(*sizes.values())
        fits = [number for number in range(1, min(whole, degree) + 1) if not whole % number]
        beside = tuple((settings or {}).get(name, name) for name in uneven)
        yield Problem(path, degree, f"must divide {named}", fits[-1], beside=beside)


def _tensor_fits_alternating_parts(job: TrainJob, _: int) -> Iterator[Problem]:
    # Fewer key heads than ranks are repeated (transformer/attention.py, num_query_groups).
    tensor = job.parallel.tensor
    for layer in distinct(job.model):
        for axis in (one.dims[0].by for one in layer.parameters):
            number = layer.sizes.along(axis) if axis else tensor
            if axis and number % tensor and tensor % number:
                setting = layer.setting(axis)
                rule = f"must divide {setting} ({number}) or be a multiple of it"
                yield Problem("parallel.tensor", tensor, rule, beside=(setting,))


def _heads_share_groups(job: TrainJob, _: int) -> Iterator[Problem]:
    for layer in distinct(job.model):
        if layer.kind.groups:
            groups, heads = layer.kind.groups
            number, whole = map(layer.sizes.along, (groups, heads))
            yield from _divides(layer.setting(groups), number, {layer.setting(heads): whole})


def _context_splits_heads(job: TrainJob, _: int) -> Iterator[Problem]:
    # Mamba layers are split by heads; few groups are repeated (ssm/mamba_context_parallel.py).
    plan = job.parallel
    for layer in distinct(job.model):
        if layer.kind.context is None:
            continue
        heads, groups = map(layer.sizes.along, layer.kind.context)
        of_heads, of_groups = map(layer.setting, layer.kind.context)
        if heads % plan.tensor or groups % plan.tensor:
            continue
        heads, groups = heads // plan.tensor, groups // plan.tensor
        yield from _divides("parallel.context", plan.context, {f"{of_heads} / tensor": heads})
        if groups % plan.context and plan.context % groups:
            rule = f"must divide {of_groups} / tensor ({groups}) or be a multiple of it"
            yield Problem("parallel.context", plan.context, rule, beside=(of_groups,))


def _experts_are_split(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    numbers, widths = {}, {}
    for layer in distinct(job.model):
        experts = [one for one in layer.parameters if one.of_experts]
        if experts:
            numbers[layer.setting(Axis.experts)] = layer.sizes.experts
        for one in _split_sizes(experts, layer.sizes):
            widths[layer.setting(one.axis)] = one.size
    if not numbers:
        if plan.expert > 1 and not isinstance(job.objective, Distill):  # a teacher may have some
            yield Problem("parallel.expert", plan.expert, "the pattern has no expert layers (E)", 1)
        return
    yield from _divides("parallel.expert", plan.expert, numbers)
    path = "parallel.tensor" if plan.expert_tensor is None else "parallel.expert_tensor"
    yield from _divides(path, degrees.expert_tensor(plan), widths)


def _sequence_parallel_fits(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.sequence is True and plan.tensor == 1:
        yield Problem("parallel.sequence", True, "needs parallel.tensor > 1", "null")
    if plan.sequence is False and plan.tensor > 1 and _pattern(job).count("E"):
        # transformer/moe/moe_layer.py refuses to train so
        yield Problem("parallel.sequence", False, "must be on: experts and tensor > 1", "true")


def _vocabulary_is_split(job: TrainJob, _: int) -> Iterator[Problem]:
    tensor, multiple = job.parallel.tensor, job.model.vocab_multiple
    size = job.model.vocab_size
    if size is None and isinstance(job.data, Quickstart):
        size = job.data.vocab_size
    # Without a size the multiple itself must split, whatever the tokenizer brings.
    padded = degrees.padded_vocab_size(size or multiple, multiple)
    if padded % tensor:
        rule = f"pads the vocabulary to {padded}; parallel.tensor ({tensor}) must divide that"
        legal = math.ceil(multiple / tensor) * tensor
        yield Problem("model.vocab_multiple", multiple, rule, legal)


def _padded_rows_are_split(job: TrainJob, _: int) -> Iterator[Problem]:
    if job.model.vocab_size is not None:
        padded = degrees.padded_vocab_size(job.model.vocab_size, job.model.vocab_multiple)
        yield from _divides("parallel.tensor", job.parallel.tensor, {"the vocabulary": padded})


def _vocabulary_holds_the_tokens(job: TrainJob, _: int) -> Iterator[Problem]:
    size = job.model.vocab_size
    if size is None or not isinstance(job.data, Quickstart) or size >= job.data.vocab_size:
        return
    if job.checkpoint.load is not None:  # whose weights have as many rows as they have
        rule = f"must not exceed the vocabulary of checkpoint.load ({size})"
        yield Problem("data.vocab_size", job.data.vocab_size, rule, size)
    else:
        rule = f"must be at least data.vocab_size ({job.data.vocab_size})"
        yield Problem("model.vocab_size", size, rule, job.data.vocab_size)


def _fused_kernels_need_a_gpu(job: TrainJob, _: int) -> Iterator[Problem]:
    if job.runtime.kernels is Kernels.fused and job.runtime.device is Device.cpu:
        yield Problem("runtime.kernels", "fused", "run on a GPU; runtime.device is cpu", "plain")


def _overlaps_build_on_each_other(job: TrainJob, _: int) -> Iterator[Problem]:
    # The gather is of the shards that the distributed optimizer has just updated.
    plan = job.parallel
    if plan.overlap_param_gather and not plan.distributed_optimizer:
        rule = "needs parallel.distributed_optimizer=true"
        yield Problem("parallel.overlap_param_gather", True, rule, "false")
    elif plan.overlap_param_gather and not plan.overlap_grad_reduce:
        rule = "needs parallel.overlap_grad_reduce=true"
        yield Problem("parallel.overlap_param_gather", True, rule, "false")


def _processes_fit_the_degrees(job: TrainJob, world_size: int) -> Iterator[Problem]:
    plan, needed = job.parallel, degrees.processes_unit(job.parallel)
    if world_size % needed == 0:
        return
    numbers = (
        f"tensor {plan.tensor}, pipeline {plan.pipeline}, context {plan.context}; "
        f"expert {plan.expert}, expert_tensor {degrees.expert_tensor(plan)}"
    )
    legal = degrees.nearest_multiple(world_size, needed)
    if isinstance(job, CheckJob) and (job.processes or job.cluster is None):
        rule = f"must be a multiple of {needed} for {numbers}"
        yield Problem("processes", world_size, rule, legal, unit=needed, beside=_DEGREES)
    elif isinstance(job, SubmitJob | CheckJob):
        assert job.cluster is not None
        own = processes_per_node(job.cluster)
        unit = math.lcm(needed, own) // own
        rule = f"makes {world_size} processes; must be a multiple of {unit} for {numbers}"
        nodes = rules_of_cluster.asked_nodes(job, job.cluster)
        legal = degrees.nearest_multiple(nodes, unit)
        yield Problem("cluster.nodes", nodes, rule, legal, unit=unit, beside=_DEGREES)
    else:
        rule = f"needs a multiple of {needed} processes, not {world_size}"
        yield Problem("parallel", numbers, rule, legal, unit=needed, beside=_DEGREES)


def _profiled_processes_exist(job: TrainJob, processes: int) -> Iterator[Problem]:
    traced = job.profile.ranks if job.profile.tool is not ProfileTool.none else []
    for number, rank in enumerate(traced):
        if rank >= processes:
            rule = f"the run has {counted(processes, 'process')}, the last is {processes - 1}"
            yield Problem(f"profile.ranks.{number}", rank, rule, processes - 1)


LAYOUT_RULES = (
    _stages_match_the_pattern,
    _tensor_splits_every_layer,
    _tensor_fits_alternating_parts,
    _heads_share_groups,
    _context_splits_heads,
    _experts_are_split,
    _sequence_parallel_fits,
    _vocabulary_is_split,
    _vocabulary_holds_the_tokens,
    _fused_kernels_need_a_gpu,
    _overlaps_build_on_each_other,
    _processes_fit_the_degrees,
    _profiled_processes_exist,
)
# What a model that is loaded has to keep: its sizes are what they are.
SPLIT_RULES = (
    _stages_match_the_pattern,
    _tensor_splits_every_layer,
    _tensor_fits_alternating_parts,
    _context_splits_heads,
    _experts_are_split,
    _padded_rows_are_split,
    _processes_fit_the_degrees,
)


def _recomputed_modules_exist(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.recompute is not Recompute.selective or plan.recompute_modules is None:
        return
    asked = plan.recompute_modules
    held = {one for layer in distinct(job.model) for one in layer.kind.recomputed(layer.sizes)}
    there = [module for module in asked if module in held]
    if there and there == asked:
        return
    path, shown = "parallel.recompute_modules", _shown(asked)
    missing = [module for module in asked if module not in there]
    rule = f"the model has no {_shown(missing)}" if missing else "must name a module"
    yield Problem(path, shown, rule, _shown(there) if there else "null")


def _shown(modules: list[RecomputeModule]) -> str:
    return f"[{','.join(module.value for module in modules)}]"


def _recomputed_layers_fit_mtp(job: TrainJob, _: int) -> Iterator[Problem]:
    # transformer/multi_token_prediction.py 1419
    plan = job.parallel
    uniform = plan.recompute is Recompute.full and plan.recompute_method is RecomputeMethod.uniform
    if uniform and plan.recompute_layers > 1 and parse(job.model.pattern).mtp_depths:
        rule = "must be 1: an MTP depth is computed again as a whole"
        yield Problem("parallel.recompute_layers", plan.recompute_layers, rule, 1)


def _reduced_state_is_split(job: TrainJob, _: int) -> Iterator[Problem]:
    # optimizer/optimizer_config.py 435
    if job.parallel.distributed_optimizer and not job.parallel.fsdp:
        return
    rule = "needs parallel.distributed_optimizer=true: Megatron keeps no other in fewer bits"
    if job.parallel.fsdp:
        rule = "needs parallel.fsdp=false: state of distributed tensors is kept in float32 alone"
    for name, value in job.optimizer.reduced_state.items():
        yield Problem(f"optimizer.{name}", value, rule, "float32")


def _main_gradients_are_the_reduced_ones(job: TrainJob, _: int) -> Iterator[Problem]:
    # State in reduced precision is updated from the buffer of the reduction (distrib_optimizer.py
    # 2758); otherwise a float32 copy of it is made, whatever its format.
    precision, given = job.precision, job.optimizer.main_gradients
    path, half = "optimizer.main_gradients", precision.base is NumberFormat.bf16
    halved = half and not precision.reduce_gradients_in_fp32
    if given is GradientFormat.bfloat16 and not half:
        yield Problem(path, given.value, "needs precision.format=bf16", "float32")
    elif given is GradientFormat.bfloat16 and not halved:
        rule = "needs precision.reduce_gradients_in_fp32=false: it is what was reduced"
        yield Problem(path, given.value, rule, "float32")
    elif given is GradientFormat.float32 and halved and job.optimizer.reduced_state:
        names = ", ".join(f"optimizer.{name}" for name in job.optimizer.reduced_state)
        rule = f"is not made of reduced bfloat16 gradients beside {names}"
        yield Problem(path, given.value, rule, "bfloat16")


def _masters_have_weights_to_differ_from(job: TrainJob, _: int) -> Iterator[Problem]:
    masters = job.optimizer.master_weights
    if masters is not MasterFormat.float32 and job.precision.base is NumberFormat.fp32:
        rule = "needs precision.format=bf16: float32 weights are their own masters"
        yield Problem("optimizer.master_weights", masters.value, rule, "float32")


def _moments_can_fall(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse a format that is too coarse for the decay rate of a moment.

    Without gradients a moment is multiplied by beta. Where that takes less than half of the
    distance to the next number, rounding takes it back, and the moment never falls.
    """
    adamw = job.optimizer
    moments = (("first_moment", "beta1"), ("second_moment", "beta2"))
    for name, rate in moments:
        given, beta = getattr(adamw, name), getattr(adamw, rate)
        if _falls(given, beta):
            continue
        rule = f"is too coarse for optimizer.{rate}={beta}, and the moment would never fall; "
        rule += f"needs 1 - {rate} > 2^-{_FRACTION_BITS[given] + 1}"
        finer = "float16" if _falls(MomentFormat.float16, beta) else "float32"
        yield Problem(f"optimizer.{name}", given.value, rule, finer)


def _falls(given: MomentFormat, beta: float) -> bool:
    bits = _FRACTION_BITS.get(given)
    return bits is None or 1 - beta > 2.0 ** -(bits + 1)


MEMORY_RULES = (
    _recomputed_modules_exist,
    _recomputed_layers_fit_mtp,
    _reduced_state_is_split,
    _main_gradients_are_the_reduced_ones,
    _masters_have_weights_to_differ_from,
    _moments_can_fall,
)


def fsdp_runs(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse FSDP where it does not run, or computes something else."""
    plan = job.parallel
    if plan.fsdp and plan.pipeline > 1:
        # Its mesh of ranks has the axes data, expert and tensor (mcore_fsdp_adapter.py 561), and
        # would leave out those of other stages.
        rule = "needs parallel.pipeline=1: Megatron-FSDP knows no pipeline stages"
        yield Problem("parallel.fsdp", True, rule, "false")
    elif plan.fsdp and not plan.distributed_optimizer:
        rule = "splits the optimizer state too: needs parallel.distributed_optimizer=true"
        yield Problem("parallel.fsdp", True, rule, "false")
    elif plan.fsdp and plan.recompute is not Recompute.none:
        # Found by the parity suite: gradients of experts of an MTP block are wrong.
        rule = "needs parallel.recompute=none: gradients of experts come out wrong otherwise"
        yield Problem("parallel.fsdp", True, rule, "false")
