"""The table of rules across the sections of a job, and how a whole job is held against it.

Rules of one section alone stand beside its fields (`schema/`), the others in `rules_of_*.py`. What
is wrong gets the nearest values that are legal together (`suggestions.py`).
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from hybrid_train.config import suggestions
from hybrid_train.config.rules_of_cluster import cluster_fits_the_run, kept_fits_the_gpus
from hybrid_train.config.rules_of_data import (
    BATCH_RULES,
    FILE_RULES,
    as_problem_of,
    conversion_problems,
    data_is_chosen,
    evaluation_problems,
    generation_problems,
    importance_problems,
    packed_rows_run,
    phases_are_in_order,
    sources_are_named_once,
    vocabulary_is_known,
)
from hybrid_train.config.rules_of_hardware import HARDWARE_RULES
from hybrid_train.config.rules_of_layout import LAYOUT_RULES, MEMORY_RULES, SPLIT_RULES, fsdp_runs
from hybrid_train.config.rules_of_model import MODEL_RULES, pattern_is_legal, rows_take_one_list
from hybrid_train.config.rules_of_precision import NATIVE_RULES, PRECISION_RULES
from hybrid_train.config.rules_of_switches import SWITCH_RULES
from hybrid_train.config.rules_of_teachers import TEACHER_RULES, teachers_exist
from hybrid_train.config.suggestions import Rule
from hybrid_train.planning.phases import views_of
from hybrid_train.schema.importance import ImportanceJob
from hybrid_train.schema.job_roots import (
    CheckJob,
    CountJob,
    EvaluateJob,
    GenerateJob,
    IndexJob,
    SubmitJob,
)
from hybrid_train.schema.model import SECTIONS
from hybrid_train.schema.problems import Problem, collect
from hybrid_train.schema.train import TrainJob

Job = Any  # a dataclass of schema/ that stands for a whole job


def check(job: Job, started: int) -> Iterator[Problem]:
    """Yield what is wrong with a job: a line a cause, with values that are legal together.

    Args:
        job: the job.
        started: number of processes that there are; a plan and a submission say their own.
    """
    # The layout of an index is that of other machines.
    if isinstance(job, TrainJob) and not isinstance(job, IndexJob):
        found = suggestions.with_nearest(job, started, suggestions.Rules(_of_sections, across))
        if not found:
            found = list(kept_fits_the_gpus(job, suggestions.processes_of(job, started)))
        yield from (_of_torchrun(problem) for problem in found)
    else:
        found = list(_of_sections(job))
        if isinstance(job, CountJob) and not found:
            found += [problem for rule in MODEL_RULES for problem in rule(job, 1)]
        yield from found
    known = {problem.path for problem in found}
    yield from (problem for problem in _of_files(job) if problem.path not in known)


def split_problems(job: TrainJob, processes: int) -> Iterator[Problem]:
    """Yield what keeps a model, as it is, from a layout on so many processes."""
    for rule in SPLIT_RULES:
        yield from (_of_torchrun(problem, "...") for problem in rule(job, processes))


def across(
    job: TrainJob, processes: int, rules: Collection[Rule] | None = None
) -> Iterator[tuple[Problem, Rule]]:
    """Yield what breaks the table in the run, its phases, its networks, and the broken rule.

    Args:
        job: the job, with sound sections.
        processes: number of processes that it runs on.
        rules: those to look at; None for all.
    """
    unreadable = [(problem, pattern_is_legal) for problem in pattern_is_legal(job, processes)]
    yield from unreadable
    if unreadable:
        return
    asked = RULES if rules is None else [rule for rule in RULES if rule in rules]
    told: set[tuple[str, object]] = set()
    for rule in asked:
        for problem in rule(job, processes):
            told |= {(problem.path, problem.rule), (problem.path, rule)}
            yield problem, rule
    for number, phase_job in enumerate(views_of(job) if job.train.phases else ()):
        for rule in asked:
            for problem in rule(phase_job, processes):
                one = as_problem_of(number, job, problem)
                # A phase with other numbers of the same fault says nothing new, unless they count.
                if one is None or (one.path, problem.rule if one.unit else rule) in told:
                    continue
                told |= {(one.path, problem.rule), (one.path, rule)}
                yield one, rule
    yield from _of_other_networks(job, processes, asked, told)


def _of_other_networks(
    job: TrainJob, processes: int, asked: Collection[Rule], told: Collection[tuple[str, object]]
) -> Iterator[tuple[Problem, Rule]]:
    """Yield what networks break that an objective adds, where the run has not broken it."""
    for name, model in job.objective.models(job.model).items():
        if model is job.model:
            continue
        view = replace(job, model=model)
        is_legal = not any(pattern_is_legal(view, processes))
        for rule in asked if is_legal else [pattern_is_legal]:
            for problem in rule(view, processes):
                if (problem.path, rule) not in told:
                    yield replace(problem, rule=f"{problem.rule} [network {name}]"), rule


def _of_sections(job: Job) -> Iterator[Problem]:
    """Yield what is wrong with sections by themselves; those of absent layers are not read."""
    pattern = getattr(getattr(job, "model", None), "pattern", "")
    absent = tuple(f"model.{name}." for letter, name in SECTIONS.items() if letter not in pattern)
    yield from (one for one in collect(job) if not (pattern and one.path.startswith(absent)))


def _of_torchrun(problem: Problem, words: str = "-m hybrid_train train ...") -> Problem:
    """Return a problem with a number of processes that no setting holds as a command.

    Args:
        problem: any.
        words: of the command, behind those of torchrun.
    """

    def command(path: str, value: object) -> object:
        if path != suggestions.PROCESSES or not isinstance(value, int):
            return value
        return f"torchrun --nproc-per-node {value} {words}"

    along = tuple((path, command(path, value)) for path, value in problem.along)
    return replace(problem, nearest=command(problem.path, problem.nearest), along=along)


def _of_files(job: Job) -> Iterator[Problem]:
    """Yield what is wrong with what a job reads: data, folders, prompts."""
    if isinstance(job, GenerateJob):
        yield from generation_problems(job)
    elif isinstance(job, EvaluateJob):
        yield from evaluation_problems(job)
    elif isinstance(job, ImportanceJob):
        yield from importance_problems(job)
    elif not isinstance(job, TrainJob):  # no parallel plan; a study composes its runs one by one
        yield from conversion_problems(job)
    else:
        # A plan does not depend on the tokens: `check` lists data not chosen yet, and passes.
        planned = isinstance(job, CheckJob) or (isinstance(job, SubmitJob) and job.dry_run)
        if isinstance(job, IndexJob):
            yield from phases_are_in_order(job, 1)
        yield from (vocabulary_is_known if planned else data_is_chosen)(job)
        yield from sources_are_named_once(job.data)
        # A plan may be for another machine, where the teachers are.
        for file_rule in FILE_RULES if planned else (*FILE_RULES, teachers_exist):
            yield from file_rule(job)


RULES: tuple[Rule, ...] = (
    phases_are_in_order,
    *MODEL_RULES,
    *LAYOUT_RULES,
    *MEMORY_RULES,
    fsdp_runs,
    *BATCH_RULES,
    packed_rows_run,
    rows_take_one_list,
    *PRECISION_RULES,
    *NATIVE_RULES,
    *SWITCH_RULES,
    *TEACHER_RULES,
    *HARDWARE_RULES,
    cluster_fits_the_run,
)
