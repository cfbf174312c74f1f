"""Rules of the layout: degrees, stages and processes beside the sizes of a model.

Rules of a layer kind apply only where the pattern has it. Where a comment names a file, it is one
of Megatron-Core 0.19.2.
"""

import math
from collections.abc import Iterator

from hybrid_train.config import node_counts
from hybrid_train.planning import degrees
from hybrid_train.planning.degrees import expert_tensor
from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.cluster import processes_per_node
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.pattern import Pattern, parse, repair
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.profile import Tool
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.train import TrainJob

_DEGREES = tuple(
    f"parallel.{name}" for name in ("tensor", "pipeline", "context", "expert", "expert_tensor")
)
_ROWS = "the rows of queries, keys and values"


def _divides(path: str, degree: int, sizes: dict[str, int]) -> Iterator[Problem]:
    """Yield a problem that names each size that a degree does not divide."""
    uneven = {name: size for name, size in sizes.items() if size % degree}
    if uneven:
        *others, last = (f"{name} ({size})" for name, size in uneven.items())
        named = f"{', '.join(others)} and {last}" if others else last
        whole = math.gcd(*sizes.values())
        fits = [number for number in range(1, min(whole, degree) + 1) if not whole % number]
        beside = tuple("model.attention.head_dim" if name == _ROWS else name for name in uneven)
        yield Problem(path, degree, f"must divide {named}", fits[-1], beside=beside)


def _pattern(job: TrainJob) -> Pattern:
    return parse(job.model.pattern)


def pattern_is_legal(job: TrainJob, _: int) -> Iterator[Problem]:
    """The pattern can be read."""
    try:
        parse(job.model.pattern)
    except ValueError as error:
        yield Problem("model.pattern", job.model.pattern, str(error), repair(job.model.pattern))


def _processes_fit_the_degrees(job: TrainJob, world_size: int) -> Iterator[Problem]:
    plan, needed = job.parallel, degrees.processes_unit(job.parallel)
    if world_size % needed == 0:
        return
    numbers = (
        f"tensor {plan.tensor}, pipeline {plan.pipeline}, context {plan.context}; "
        f"expert {plan.expert}, expert_tensor {expert_tensor(plan)}"
    )
    legal = degrees.nearest_multiple(world_size, needed)
    if isinstance(job, CheckJob):
        rule = f"must be a multiple of {needed} for {numbers}"
        yield Problem("processes", world_size, rule, legal, unit=needed, beside=_DEGREES)
    elif isinstance(job, SubmitJob):
        own = processes_per_node(job.cluster)
        unit = math.lcm(needed, own) // own
        rule = f"makes {world_size} processes; must be a multiple of {unit} for {numbers}"
        nodes = node_counts.nodes(job)
        legal = degrees.nearest_multiple(nodes, unit)
        yield Problem("cluster.nodes", nodes, rule, legal, unit=unit, beside=_DEGREES)
    else:
        rule = f"needs a multiple of {needed} processes, not {world_size}"
        yield Problem("parallel", numbers, rule, legal, unit=needed, beside=_DEGREES)


def _tensor_splits_every_layer(job: TrainJob, _: int) -> Iterator[Problem]:
    model, pattern = job.model, _pattern(job)
    sizes = {}
    if pattern.count("*"):
        heads = model.attention
        sizes["model.attention.heads"] = heads.heads
        rows = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
        sizes[_ROWS] = rows
    if pattern.count("M"):
        sizes["model.mamba.heads"] = model.mamba.heads
        sizes["model.mamba.groups"] = model.mamba.groups
    if pattern.count("-"):
        sizes["model.mlp.intermediate_size"] = model.mlp.intermediate_size
    if pattern.count("E") and model.moe.shared_intermediate_size is not None:
        sizes["model.moe.shared_intermediate_size"] = model.moe.shared_intermediate_size
    if pattern.mtp_depths:  # the projection that joins token and hidden state is column-parallel
        sizes["model.hidden_size"] = model.hidden_size
    yield from _divides("parallel.tensor", job.parallel.tensor, sizes)


def _tensor_fits_kv_heads(job: TrainJob, _: int) -> Iterator[Problem]:
    # Fewer key heads than ranks are repeated (transformer/attention.py, num_query_groups).
    tensor, kv_heads = job.parallel.tensor, job.model.attention.kv_heads
    if _pattern(job).count("*") and kv_heads % tensor and tensor % kv_heads:
        rule = f"must divide model.attention.kv_heads ({kv_heads}) or be a multiple of it"
        yield Problem("parallel.tensor", tensor, rule, beside=("model.attention.kv_heads",))


def _query_heads_share_kv_heads(job: TrainJob, _: int) -> Iterator[Problem]:
    sizes = job.model.attention
    if _pattern(job).count("*"):
        path = "model.attention.kv_heads"
        yield from _divides(path, sizes.kv_heads, {"model.attention.heads": sizes.heads})


def _mamba_heads_share_groups(job: TrainJob, _: int) -> Iterator[Problem]:
    sizes = job.model.mamba
    if _pattern(job).count("M"):
        path = "model.mamba.groups"
        yield from _divides(path, sizes.groups, {"model.mamba.heads": sizes.heads})


def _context_splits_mamba(job: TrainJob, _: int) -> Iterator[Problem]:
    # Mamba layers are split by heads; few groups are repeated (ssm/mamba_context_parallel.py).
    plan, sizes = job.parallel, job.model.mamba
    if not _pattern(job).count("M") or sizes.heads % plan.tensor or sizes.groups % plan.tensor:
        return
    heads, groups = sizes.heads // plan.tensor, sizes.groups // plan.tensor
    yield from _divides("parallel.context", plan.context, {"model.mamba.heads / tensor": heads})
    if groups % plan.context and plan.context % groups:
        rule = f"must divide model.mamba.groups / tensor ({groups}) or be a multiple of it"
        yield Problem("parallel.context", plan.context, rule, beside=("model.mamba.groups",))


def _experts_are_split(job: TrainJob, _: int) -> Iterator[Problem]:
    plan, sizes = job.parallel, job.model.moe
    if not _pattern(job).count("E"):
        if plan.expert > 1:
            yield Problem("parallel.expert", plan.expert, "the pattern has no expert layers (E)", 1)
        return
    yield from _divides("parallel.expert", plan.expert, {"model.moe.experts": sizes.experts})
    path = "parallel.tensor" if plan.expert_tensor is None else "parallel.expert_tensor"
    width = {"model.moe.intermediate_size": sizes.intermediate_size}
    yield from _divides(path, expert_tensor(plan), width)


def _sequence_parallel_fits(job: TrainJob, _: int) -> Iterator[Problem]:
    plan = job.parallel
    if plan.sequence is True and plan.tensor == 1:
        yield Problem("parallel.sequence", True, "needs parallel.tensor > 1", "null")
    if plan.sequence is False and plan.tensor > 1 and _pattern(job).count("E"):
        # transformer/moe/moe_layer.py refuses to train so
        yield Problem("parallel.sequence", False, "must be on: experts and tensor > 1", "true")


def _stages_match_the_pattern(job: TrainJob, _: int) -> Iterator[Problem]:
    # Without cuts of the user's own the layers are cut by their cost (planning/stages.py).
    plan, pattern = job.parallel, _pattern(job)
    stages = plan.pipeline * plan.virtual_pipeline
    if plan.virtual_pipeline > 1 and plan.pipeline == 1:
        rule = "needs parallel.pipeline > 1"
        yield Problem("parallel.virtual_pipeline", plan.virtual_pipeline, rule, 1)
    elif stages > len(pattern.main):
        name = "pipeline" if plan.pipeline > len(pattern.main) else "virtual_pipeline"
        rule = f"makes {stages} stages of {len(pattern.main)} main layers; each needs one"
        yield Problem(f"parallel.{name}", getattr(plan, name), rule)
    elif pattern.is_cut and len(pattern.stages) != stages:
        rule = f"has {len(pattern.stages)} stages; pipeline x virtual_pipeline is {stages}"
        uncut = pattern.cut([len(pattern.main)])
        yield Problem("model.pattern", job.model.pattern, rule, str(uncut))


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


def _profiled_processes_exist(job: TrainJob, processes: int) -> Iterator[Problem]:
    for number, rank in enumerate(job.profile.ranks if job.profile.tool is not Tool.none else ()):
        if rank >= processes:
            rule = f"the run has {processes} processes, the last is {processes - 1}"
            yield Problem(f"profile.ranks.{number}", rank, rule, processes - 1)


LAYOUT_RULES = (
    _stages_match_the_pattern,
    _tensor_splits_every_layer,
    _tensor_fits_kv_heads,
    _query_heads_share_kv_heads,
    _mamba_heads_share_groups,
    _context_splits_mamba,
    _experts_are_split,
    _sequence_parallel_fits,
    _vocabulary_is_split,
    _vocabulary_holds_the_tokens,
    _fused_kernels_need_a_gpu,
    _overlaps_build_on_each_other,
    _processes_fit_the_degrees,
    _profiled_processes_exist,
)
