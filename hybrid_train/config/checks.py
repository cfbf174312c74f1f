"""Rules across the sections of a training run, and the nearest value that keeps them.

Each rule is a small function in the table `RULES`. Rules of one section alone stand beside its
fields (`schema/`), rules about files in `check_files.py`, about what saves memory in
`check_memory.py`; rules of a layer kind apply only where the pattern has it. Where a comment names
a file, it is one of Megatron-Core 0.19.2.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import reduce
from typing import Any

from hybrid_train.config import degrees, node_counts
from hybrid_train.config.check_batch import BATCH_RULES
from hybrid_train.config.check_cluster import cluster_fits_the_run
from hybrid_train.config.check_files import (
    FILE_RULES,
    data_is_chosen,
    folder_problems,
    generation_problems,
    vocabulary_is_known,
)
from hybrid_train.config.check_fsdp import fsdp_runs
from hybrid_train.config.check_memory import MEMORY_RULES
from hybrid_train.config.check_native import NATIVE_RULES
from hybrid_train.config.check_packing import packed_rows_run
from hybrid_train.config.check_phases import (
    as_problem_of,
    phases_are_in_order,
    sources_are_named_once,
)
from hybrid_train.config.check_precision import PRECISION_RULES
from hybrid_train.config.degrees import expert_tensor
from hybrid_train.config.pattern import Pattern, parse, repair
from hybrid_train.config.phases import jobs_of
from hybrid_train.config.problems import Problem
from hybrid_train.config.schema.check import CheckJob
from hybrid_train.config.schema.convert import ConvertJob
from hybrid_train.config.schema.count import CountJob
from hybrid_train.config.schema.data import Quickstart
from hybrid_train.config.schema.generate import GenerateJob
from hybrid_train.config.schema.prepare import DataJob
from hybrid_train.config.schema.profile import Tool
from hybrid_train.config.schema.report import ReportJob, StatusJob
from hybrid_train.config.schema.resume import ResumeJob
from hybrid_train.config.schema.runtime import Device, Kernels
from hybrid_train.config.schema.show import IndexJob, ShowJob
from hybrid_train.config.schema.study import StudyJob
from hybrid_train.config.schema.submit import SubmitJob
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.config.schema.verify import VerifyJob

_SEARCH_WIDTH = 4096  # how far from a value the nearest legal one is looked for

Job = (
    TrainJob
    | StudyJob
    | ResumeJob
    | GenerateJob
    | CountJob
    | ConvertJob
    | VerifyJob
    | ShowJob
    | DataJob
    | StatusJob
    | ReportJob
)
Rule = Callable[[TrainJob, int], Iterator[Problem]]


def check(job: Job, world_size: int) -> Iterator[Problem]:
    """Yield every broken rule of a job whose sections are sound by themselves.

    Args:
        job: the job.
        world_size: number of processes it runs on.
    """
    if isinstance(job, GenerateJob):
        yield from generation_problems(job)
        return
    if not isinstance(job, TrainJob):  # no parallel plan; a study composes its runs one by one
        yield from folder_problems(job)
        return
    if isinstance(job, IndexJob):  # its layout is that of other machines
        yield from _data_problems(job)
        return
    in_order = list(phases_are_in_order(job))
    found = list(_with_nearest_of(job, world_size))
    if not (in_order or found):
        for number, phase_job in enumerate(jobs_of(job) if job.train.phases else ()):
            for problem in _with_nearest_of(phase_job, world_size):
                found += filter(None, [as_problem_of(number, job, problem)])
    yield from (*in_order, *dict.fromkeys(found))
    # A plan does not depend on the tokens: `check` lists data that is not chosen yet, and passes.
    planned = isinstance(job, CheckJob) or (isinstance(job, SubmitJob) and job.dry_run)
    yield from (vocabulary_is_known if planned else data_is_chosen)(job)
    yield from sources_are_named_once(job.data)
    for file_rule in FILE_RULES:
        yield from file_rule(job)
    if isinstance(job, SubmitJob):
        yield from cluster_fits_the_run(job)


def _data_problems(job: TrainJob) -> Iterator[Problem]:
    """Yield what is wrong with the data and phases of a run, whatever its layout."""
    yield from phases_are_in_order(job)
    yield from data_is_chosen(job)
    yield from sources_are_named_once(job.data)
    for file_rule in FILE_RULES:
        yield from file_rule(job)


def _with_nearest_of(job: TrainJob, world_size: int) -> Iterator[Problem]:
    """Yield every problem of the table, each with its nearest legal value."""
    found = _broken(job, world_size)
    broken = {rule for _, rule in found}
    for problem, rule in found:
        yield _with_nearest(problem, rule, job, world_size, broken)


def mended(job: Job, problems: Iterable[Problem]) -> Job:
    """Return a copy with the nearest legal values in place, so that other rules can be tried."""
    copied = copy.deepcopy(job)
    for problem in problems:
        section_path, _, name = problem.path.rpartition(".")
        # What has no place of its own, such as a name of the user's with a dot, stays as it is.
        with suppress(AttributeError, LookupError, ValueError):
            if problem.nearest is not None:
                _put(_section(copied, section_path), name, problem.nearest)
    return copied


def _put(section: Any, name: str, value: object) -> None:
    """Set a part of a section by name, of a list by number; a section gets no new ones."""
    if isinstance(section, list):
        section[int(name)] = value
    elif isinstance(section, dict):
        if isinstance(section[name], int | float):  # else the name is what is wrong
            section[name] = value
    elif hasattr(section, name):
        setattr(section, name, value)


def _section(job: object, path: str) -> object:
    """Return the section at a dotted path; the job itself for an empty one."""
    return reduce(_part, path.split("."), job) if path else job


def _part(section: object, name: str) -> object:
    """Return a part of a section by name, of a list by number."""
    if isinstance(section, list):
        return section[int(name)]
    return section[name] if isinstance(section, dict) else getattr(section, name)


def _broken(job: TrainJob, world_size: int) -> list[tuple[Problem, Rule]]:
    """Apply the table; a pattern that cannot be read leaves nothing to compare with."""
    unreadable: list[tuple[Problem, Rule]] = [
        (problem, _pattern_is_legal) for problem in _pattern_is_legal(job, world_size)
    ]
    if unreadable:
        return unreadable
    return [(problem, rule) for rule in RULES for problem in rule(job, world_size)]


def _with_nearest(
    problem: Problem, rule: Rule, job: TrainJob, world_size: int, broken: set[Rule]
) -> Problem:
    """Add the nearest whole number that mends the rule, best one that breaks no other."""
    value = problem.value
    if problem.nearest is not None or not isinstance(value, int) or isinstance(value, bool):
        return problem
    section_path, _, name = problem.path.rpartition(".")
    trial = copy.deepcopy(job)
    section = _section(trial, section_path)
    second_best: int | None = None
    for distance in range(1, _SEARCH_WIDTH):
        for candidate in (value - distance, value + distance):
            setattr(section, name, candidate)
            if candidate < 1 or any(p.path == problem.path for p in rule(trial, world_size)):
                continue
            if {still for _, still in _broken(trial, world_size)} <= broken:
                return Problem(problem.path, value, problem.rule, candidate)
            second_best = second_best or candidate
        if second_best is not None and distance > abs(second_best - value) + 64:
            break
    return Problem(problem.path, value, problem.rule, second_best)


def _divides(path: str, degree: int, sizes: dict[str, int]) -> Iterator[Problem]:
    """Yield a problem for each size that a degree does not divide."""
    for name, size in sizes.items():
        if size % degree:
            yield Problem(path, degree, f"must divide {name} ({size})")


def _pattern(job: TrainJob) -> Pattern:
    return parse(job.model.pattern)


def _pattern_is_legal(job: TrainJob, _: int) -> Iterator[Problem]:
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
        yield Problem("processes", world_size, rule, legal)
    elif isinstance(job, SubmitJob):
        unit = node_counts.unit(job)
        rule = f"makes {world_size} processes; must be a multiple of {unit} for {numbers}"
        legal = degrees.nearest_multiple(node_counts.nodes(job), unit)
        yield Problem("cluster.nodes", node_counts.nodes(job), rule, legal)
    else:
        rule = f"needs a multiple of {needed} processes, not {world_size}"
        hint = f"torchrun --nproc-per-node {legal} -m hybrid_train train ..."
        yield Problem("parallel", numbers, rule, hint)


def _tensor_splits_every_layer(job: TrainJob, _: int) -> Iterator[Problem]:
    model, pattern = job.model, _pattern(job)
    sizes = {}
    if pattern.count("*"):
        heads = model.attention
        sizes["model.attention.heads"] = heads.heads
        rows = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
        sizes["the rows of queries, keys and values"] = rows
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
        yield Problem("parallel.tensor", tensor, rule)


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
        yield Problem("parallel.context", plan.context, rule)


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
    # Without cuts of the user's own the layers are cut by their cost (model/stages.py).
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
    if size is not None and isinstance(job.data, Quickstart) and size < job.data.vocab_size:
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


def _profiled_processes_exist(job: TrainJob, world_size: int) -> Iterator[Problem]:
    for number, rank in enumerate(job.profile.ranks if job.profile.tool is not Tool.none else ()):
        if rank >= world_size:
            rule = f"the run has {world_size} processes, the last is {world_size - 1}"
            yield Problem(f"profile.ranks.{number}", rank, rule, world_size - 1)


RULES: tuple[Rule, ...] = (
    _processes_fit_the_degrees,
    _stages_match_the_pattern,
    _tensor_splits_every_layer,
    _tensor_fits_kv_heads,
    _query_heads_share_kv_heads,
    _mamba_heads_share_groups,
    _context_splits_mamba,
    _experts_are_split,
    _sequence_parallel_fits,
    *BATCH_RULES,
    _vocabulary_is_split,
    _vocabulary_holds_the_tokens,
    _fused_kernels_need_a_gpu,
    _overlaps_build_on_each_other,
    *MEMORY_RULES,
    *PRECISION_RULES,
    *NATIVE_RULES,
    fsdp_runs,
    packed_rows_run,
    _profiled_processes_exist,
)
