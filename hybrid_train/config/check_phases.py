"""Rules about sources, blends and phases: names that exist, an order, settings that run."""

import re
from collections.abc import Iterator
from dataclasses import replace

from hybrid_train.planning.phases import SETTINGS
from hybrid_train.schema.data import Data, Packing, has_sources
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.source import Split
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import is_position, is_tokens, position, tokens

_RULE_OF_RUN = re.compile(r"precision\.exceptions\.(\d+)(.*)")


def sources_are_named_once(data: Data) -> Iterator[Problem]:
    """Files stand in one of two places, and a blend speaks of sources that there are."""
    if data.sources and (data.train or data.validation):
        name = "train" if data.train else "validation"
        rule = "must be empty with data.sources: name these files in a source"
        yield Problem(f"data.{name}", getattr(data, name), rule, "[]")
    for blend, split in (("blend", Split.train), ("validation_blend", Split.validation)):
        for name, weight in getattr(data, blend).items():
            yield from _blended(f"data.{blend}", name, weight, data, split)
    for name, source in data.sources.items():
        if source.longest is not None and data.packing is Packing.none:
            path = f"data.sources.{name}.longest"
            yield Problem(path, source.longest, "needs data.packing=best_fit", "null")


def _blended(path: str, name: str, weight: float, data: Data, split: Split) -> Iterator[Problem]:
    """Yield what is wrong with one entry of a blend."""
    if not has_sources(data) or name not in data.sources:
        known = ", ".join(data.sources) or "none"
        rule = f"is no source of data.sources ({known})"
        yield Problem(f"{path}.{name}", weight, rule, nearest(name, data.sources))
    elif weight > 0 and not data.sources[name].has(split):
        yield Problem(f"{path}.{name}", weight, f"has no {split.value} data", 0)


def phases_are_in_order(job: TrainJob, _: int) -> Iterator[Problem]:
    """Phases have names of their own, begin at the start of the run, and follow each other."""
    phases, total = job.train.phases, job.train.tokens
    if not phases or not is_tokens(total) or not all(is_position(one.start) for one in phases):
        return  # reported where they stand
    for number, phase in enumerate(phases):
        path = f"train.phases.{number}"
        # Without sources these blends are left out (`phases.unread_sources`), and that is said.
        for name, weight in phase.blend.items() if has_sources(job.data) else ():
            yield from _blended(f"{path}.blend", name, weight, job.data, Split.train)
        if phase.name in {one.name for one in phases[:number]}:
            yield Problem(f"{path}.name", phase.name, "is the name of an earlier phase")
        start = position(phase.start, tokens(total))
        if number == 0 and start:
            yield Problem(f"{path}.start", phase.start, "must be 0: the run begins with it", "0")
        elif number and start <= position(phases[number - 1].start, tokens(total)):
            rule = f"must lie after the start of the phase before ({phases[number - 1].start})"
            yield Problem(f"{path}.start", phase.start, rule)
        elif start >= tokens(total):
            rule = (
                f"must lie before train.tokens ({total}); 'train.phases=[]' trains without phases"
            )
            yield Problem(f"{path}.start", phase.start, rule)
    ramp = job.train.batch_ramp.tokens
    if len(phases) > 1 and is_tokens(ramp):
        second = position(phases[1].start, tokens(total))
        if tokens(ramp) > second:
            rule = f"must not exceed the start of the second phase ({phases[1].start})"
            legal = phases[1].start if is_tokens(phases[1].start) else str(second)
            yield Problem("train.batch_ramp.tokens", ramp, rule, legal)


def as_problem_of(number: int, job: TrainJob, problem: Problem) -> Problem | None:
    """Return a problem of the run as it is in a phase, with the path of what caused it.

    That is the setting of the latest phase up to this one which sets it, or that of the run. None
    for an exception of the run, which stands behind those of the phase: they may well leave it
    nothing to decide, and what is wrong with it otherwise is found in the run itself. None, too,
    for weights in FP8, of which a phase may keep none any more.
    """
    if problem.path == "precision.fp8_param_gather":
        return None
    if rule := _RULE_OF_RUN.fullmatch(problem.path):
        for earlier in range(number, -1, -1):
            own = job.train.phases[earlier].precision_exceptions
            if own is not None:
                path = f"train.phases.{earlier}.precision_exceptions.{rule[1]}{rule[2]}"
                return replace(problem, path=path) if int(rule[1]) < len(own) else None
        return None
    beside = tuple(_where(number, job, path) for path in problem.beside)
    place = _where(number, job, problem.path)
    if place != problem.path:
        return replace(problem, path=place, beside=beside)
    phase = job.train.phases[number].name
    return replace(problem, rule=f"{problem.rule} [phase {phase}]", beside=beside)


def _where(number: int, job: TrainJob, path: str) -> str:
    """Return where a setting of the run is set for a phase: there, or in the run."""
    for name, of_run in SETTINGS.items():
        if path == of_run:
            for earlier in range(number, -1, -1):
                if getattr(job.train.phases[earlier], name):
                    return f"train.phases.{earlier}.{name}"
    return path
