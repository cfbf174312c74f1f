"""Rules about what a student learns from: teachers that are there, and what goes with them."""

from collections.abc import Iterator

from hybrid_train.config.rules_of_data import folder_problems
from hybrid_train.schema.objective import SELF, Distill, MtpTarget
from hybrid_train.schema.parallel import Recompute
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob


def _self_has_weights(job: TrainJob, _: int) -> Iterator[Problem]:
    rule = "is what the run starts from, and needs checkpoint.load=RUN checkpoint.load_only=weights"
    for path, source in _teachers(job):
        if source == SELF and job.checkpoint.load is None:
            yield Problem(path, SELF, rule)


def _unlearned_depths_are_waited_for_by_nobody(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse MTP blocks without a gradient where a reduction begins once all have theirs."""
    settings = job.objective
    if not isinstance(settings, Distill) or settings.mtp is not MtpTarget.off:
        return
    if parse(job.model.pattern).mtp_depths and job.parallel.overlap_grad_reduce:
        rule = "waits for gradients of MTP blocks, which objective.mtp=off leaves without one"
        yield Problem("parallel.overlap_grad_reduce", True, rule, "false")


def _hidden_states_have_a_pair(job: TrainJob, _: int) -> Iterator[Problem]:
    """Layers are those of the model, and are computed once; one teacher has hidden states."""
    settings = job.objective
    if not isinstance(settings, Distill) or not settings.hidden.layers:
        return
    path, count = "objective.hidden.layers", len(parse(job.model.pattern).layers)
    for number in settings.hidden.layers:
        if not 1 <= number <= count:
            rule = f"names layer {number} of the student, which has {count}, numbered from 1"
            yield Problem(path, settings.hidden.layers, rule)
    if len(settings.teachers) > 1 or settings.targets is not None:
        rule = "needs one teacher that runs: several have no common hidden states, targets none"
        yield Problem(path, settings.hidden.layers, rule, "{}")
    if job.parallel.recompute is Recompute.full:
        rule = "computes layers again when the teacher's states are another microbatch's"
        yield Problem("parallel.recompute", "full", f"{rule}: objective.hidden", "selective")
    if job.parallel.fsdp:
        rule = "shards the projections of objective.hidden, which no test has seen"
        yield Problem("parallel.fsdp", True, rule, "false")


def teachers_exist(job: TrainJob) -> Iterator[Problem]:
    """Teachers are folders; what is in them is looked at when the run begins."""
    for path, source in _teachers(job):
        if source != SELF:
            yield from folder_problems(path, source)


def _teachers(job: TrainJob) -> Iterator[tuple[str, str]]:
    """Yield the setting of each teacher and what it says."""
    settings = job.objective
    if not isinstance(settings, Distill):
        return
    if settings.teacher is not None:
        yield "objective.teacher", settings.teacher
    for number, one in enumerate(settings.teachers):
        yield f"objective.teachers.{number}.checkpoint", one.checkpoint


TEACHER_RULES = (
    _self_has_weights,
    _unlearned_depths_are_waited_for_by_nobody,
    _hidden_states_have_a_pair,
)
