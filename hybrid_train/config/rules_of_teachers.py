"""Rules about what a student learns from: teachers that are there, and what goes with them."""

from collections.abc import Iterator

from hybrid_train.config.rules_of_data import checkpoint_problems, folder_problems
from hybrid_train.schema.objective import SELF, Distill
from hybrid_train.schema.parallel import Recompute
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob


def _self_has_weights(job: TrainJob, _: int) -> Iterator[Problem]:
    rule = "is what the run starts from, and needs checkpoint.load=RUN checkpoint.load_only=weights"
    for path, source in _teachers(job):
        if source == SELF and job.checkpoint.load is None:
            yield Problem(path, SELF, rule)


def _hidden_states_have_a_pair(job: TrainJob, _: int) -> Iterator[Problem]:
    """Layers are those of the model, and are computed once; one teacher has hidden states."""
    settings = job.objective
    if not isinstance(settings, Distill) or not settings.hidden.layers:
        return
    path, count = "objective.hidden.layers", len(parse(job.model.pattern).main)
    for place, number in enumerate(settings.hidden.layers):
        if number > count:
            rule = f"must be at most {count}, the layers of the model"
            yield Problem(f"{path}.{place}", number, rule, count)
    if len(settings.teachers) > 1 or settings.targets is not None:
        rule = "needs one teacher that runs: several have no common hidden states, targets none"
        yield Problem(path, settings.hidden.layers, rule, "[]")
    if job.parallel.recompute is Recompute.full:
        rule = "computes layers again when the teacher's states are another microbatch's"
        yield Problem("parallel.recompute", "full", f"{rule}: objective.hidden", "selective")
    if job.parallel.fsdp:
        rule = "shards the projections of objective.hidden, which no test has seen"
        yield Problem("parallel.fsdp", True, rule, "false")


def teachers_exist(job: TrainJob) -> Iterator[Problem]:
    """Teachers are folders or URLs, targets a folder; what is in them is looked at later."""
    if isinstance(job.objective, Distill) and job.objective.targets is not None:
        yield from folder_problems("objective.targets", job.objective.targets)
    for path, source in _teachers(job):
        if source != SELF:
            yield from checkpoint_problems(path, source)


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
    _hidden_states_have_a_pair,
)
