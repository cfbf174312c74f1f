"""Rules about what a student learns from: teachers that are there, and what goes with them."""

from collections.abc import Iterator

from hybrid_train.config.rules_of_data import folder_problems
from hybrid_train.schema.objective import SELF, Distill, MtpTarget
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


def teachers_exist(job: TrainJob) -> Iterator[Problem]:
    """Teachers and targets are folders; what is in them is looked at when the run begins."""
    if isinstance(job.objective, Distill) and job.objective.targets is not None:
        yield from folder_problems("objective.targets", job.objective.targets)
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


TEACHER_RULES = (_self_has_weights, _unlearned_depths_are_waited_for_by_nobody)
