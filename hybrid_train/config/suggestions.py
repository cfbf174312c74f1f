"""The smallest change that fixes a configuration: nothing is offered that is refused afterwards.

A rule knows a value that keeps it, but not what the other rules and phases say to that. So each
value is tried on the whole job first. One wrong setting often breaks many rules; it gets one line.
Values that only hold together are offered together.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from omegaconf import OmegaConf

from hybrid_train.config import rules_of_cluster
from hybrid_train.schema.job_roots import CheckJob, SubmitJob
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob

Rule = Callable[[TrainJob, int], Iterator[Problem]]
Values = dict[str, object]  # path of a setting -> what is tried there

PROCESSES = "parallel"  # path of the number of processes where no setting holds it
_WIDTH = 512  # numbers on each side of a value that are tried
_MULTIPLES = 64  # the same, where a rule asks for multiples of a number
_TRIES = 24  # values of a setting that keep its own rules and are tried on the others
_TRIES_ALONE = 64
_COMPARED_ALONE = 2000  # so that large jobs are answered in a second
_ROUNDS = 40


@dataclass(frozen=True)
class Rules:
    """What a job is held against.

    Attributes:
        sections: yields the problems of the sections by themselves.
        across: yields those of the run and of each phase, where sections are sound, each with the
            rule that is broken; of some rules alone if they are given.
    """

    sections: Callable[[TrainJob], Iterable[Problem]]
    across: Callable[[TrainJob, int, Collection[Rule] | None], Iterator[tuple[Problem, Rule]]]


def processes_of(job: object, started: int) -> int:
    """Return the number of processes that a job is for; `started` where it does not say so."""
    if isinstance(job, CheckJob) and (job.processes or job.cluster is None):
        return job.processes or 1
    if isinstance(job, SubmitJob | CheckJob):
        assert job.cluster is not None
        return rules_of_cluster.asked_processes(job, job.cluster)
    return started


def with_nearest(job: TrainJob, started: int, rules: Rules) -> list[Problem]:
    """Return one problem for each cause, with values that are legal when all are taken at once.

    Args:
        job: the job.
        started: number of processes that there are, for a job that does not say it.
        rules: what it must keep.
    """
    search = _Search(job, started, rules)
    sound = search.sound_sections()
    found = [*search.of_sections, *search.problems(sound)]
    if not found:
        return []
    search.known = {problem.path for problem in found}
    values = search.smallest(search.solved(sound), sound)
    # What a change brings to light is told too where nothing fixes it.
    found += [one for one in search.problems(values) if one.path not in search.known]
    return _lines(found, values, search)


@dataclass
class _Search:
    """What was learned of a job on the way.

    Attributes:
        job: as it is.
        started: processes that there are.
        rules: what it must keep.
        of_sections: problems of its sections.
        known: paths of all problems before any value was changed.
        unfixed: paths without a legal value.
        beside: settings that rules compare the wrong ones with, and one of the latter.
        parents: for a setting that is sound by itself, the one whose change asks for its own.
    """

    job: TrainJob
    started: int
    rules: Rules
    of_sections: list[Problem] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    unfixed: set[str] = field(default_factory=set)
    beside: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    _broken: dict[str, dict[Rule, None]] = field(default_factory=dict)  # rules that named a path
    _hints: dict[str, list[object]] = field(default_factory=dict)  # what they asked for there
    _units: dict[str, dict[int, None]] = field(default_factory=dict)  # multiples they asked for
    _given: dict[str, object] = field(default_factory=dict)  # what stands there
    _tried: set[tuple[str, str]] = field(default_factory=set)
    _compared: int = 0  # values that were held against the rules of a setting

    def sound_sections(self) -> Values:
        """Return values that keep the limits of the sections; the rules may look at no others."""
        values: Values = {}
        self.of_sections = found = self._unsound(values)
        for _ in range(_ROUNDS):
            if not found:
                break
            path = found[0].path
            others = _without(values, path)
            numbers = self._candidates(path) if self._takes(found[0]) else []
            candidates = [*self._hints[path], *numbers[:_TRIES]] if numbers else []
            tried = ({**others, path: value} for value in candidates)
            best = min(tried, key=lambda one: len(self._unsound(one)), default=others)
            values = best
            if any(problem.path == path for problem in self._unsound(best)):
                self.unfixed.add(path)
                values = others
            found = self._unsound(values)
        for path in values:
            values = {**values, path: self._quietest(path, values)}
        return values

    def _quietest(self, path: str, values: Values) -> object:
        """Return the value of a section that breaks the fewest rules across sections."""
        numbers = self._candidates(path)[:_TRIES] if isinstance(values[path], int) else []
        tried = [{**values, path: value} for value in (values[path], *numbers)]
        sound = [one for one in tried if not self._unsound(one)]
        best = min(sound, default=values, key=lambda one: len({p.path for p in self._look(one)}))
        return best[path]

    def problems(self, values: Values) -> list[Problem]:
        """Return what is wrong with these values in place, and learn from it."""
        return list(self._look(values))

    def passes(self, values: Values) -> bool:
        """Tell whether these values leave nothing but what has no legal value."""
        return not any(problem.path not in self.unfixed for problem in self._look(values))

    def solved(self, values: Values) -> Values:
        """Return values that leave nothing wrong, found one setting after the other."""
        last = ""
        for _ in range(_ROUNDS):
            wrong = [one for one in self.problems(values) if one.path not in self.unfixed]
            if not wrong:
                return values
            path = wrong[0].path
            if path not in self.known and last:
                self.parents.setdefault(path, last)
            chosen = self._choice(path, values, {one.path for one in wrong})
            if chosen is None:
                self.unfixed.add(path)
                values = _without(values, path)
            else:
                values, last = {**values, path: chosen}, path
        self.unfixed |= {one.path for one in self.problems(values)}
        return {path: value for path, value in values.items() if path not in self.unfixed}

    def smallest(self, values: Values, sections: Values) -> Values:
        """Return as few of the values as will do, each as near as can be; see `_alone`."""
        if not self.passes(values):
            return {}
        if len(values) > 1 and (alone := self._alone(sections)):
            return alone
        for path in reversed(list(values)):
            fewer = _without(values, path)
            values = fewer if self.passes(fewer) else values
        for path in values:
            values = {**values, path: self._nearest(path, _without(values, path), values[path])}
        return values

    def _alone(self, sections: Values) -> Values:
        """Return the one value that fixes everything; none if there is no such.

        Args:
            sections: values that keep the limits of sections; each of these settings must change.
        """
        if len(sections) > 1:
            return {}
        most = self._compared + _COMPARED_ALONE
        often = sorted(self.known, key=lambda path: (-len(self._broken.get(path, ())), path))
        for path in list(sections) or [*often, *self.beside]:
            for value in islice(self._fitting(path, {}), _TRIES_ALONE):
                if self.passes({path: value}):
                    return {path: value}
            if self._compared > most:
                break
        return {}

    def _nearest(self, path: str, others: Values, found: object) -> object:
        """Return the nearest value that passes beside others; at the latest the one found."""
        for value in islice(self._fitting(path, others), _TRIES):
            if value == found or self.passes({**others, path: value}):
                return value
        return found

    def _choice(self, path: str, values: Values, wrong: set[str]) -> object | None:
        """Return the nearest value that opens no problem elsewhere, else the nearest of all."""
        others, nearest = _without(values, path), None
        for value in islice(self._fitting(path, others), _TRIES):
            tried = {**others, path: value}
            if (path, repr(sorted(tried.items(), key=str))) in self._tried:
                continue
            nearest = value if nearest is None else nearest
            if all(one.path in wrong | self.unfixed for one in self._look(tried)):
                nearest = value
                break
        chosen = {**others, path: nearest}
        self._tried.add((path, repr(sorted(chosen.items(), key=str))))
        return nearest

    def _fitting(self, path: str, others: Values) -> Iterator[object]:
        """Yield values of a setting that keep its own rules beside others, nearest first."""
        base, rules = self._with(others), self._broken.get(path, {})
        for value in self._candidates(path):
            if self.of_sections and self._unsound({**others, path: value}):
                continue
            self._compared += 1
            job, started = self._put(base, path, value)
            across = self.rules.across(job, processes_of(job, started), rules)
            broken = next((problem for problem, _ in across if problem.path == path), None)
            if broken is None:
                yield value
            else:
                self._learn(broken)  # it may ask for a value that is no candidate yet

    def _candidates(self, path: str) -> list[object]:
        """Return what may be tried at a path: numbers by distance, else what rules asked for."""
        given, hints = self._given.get(path), self._hints.get(path, [])
        if not isinstance(given, int) or isinstance(given, bool):
            return hints
        found = {hint for hint in hints if isinstance(hint, int)}
        units = self._units.get(path, {})
        spans = dict.fromkeys([*units, math.lcm(*units)], _MULTIPLES)
        if not units:
            spans = {1: _WIDTH}
        for unit, reach in {1: _MULTIPLES, **spans}.items():
            middle = given // unit
            found |= {(middle + step) * unit for step in range(-reach, reach + 1)}
        found |= {2**power for power in range(13)}
        legal = (number for number in found if (number > 0 or number in hints) and number != given)
        nearest = sorted(legal, key=lambda one: (abs(one - given), one not in hints[:1], one))
        return [*(hint for hint in hints if isinstance(hint, str)), *nearest]  # "null" first

    def _look(self, values: Values) -> Iterator[Problem]:
        """Yield what is wrong with values in place.

        Rules come first where all sections were sound, for they are quick to say no.
        """
        unsound = self._unsound(values) if self.of_sections else []
        yield from unsound
        if unsound:
            return
        job, started = self._with(values)
        for problem, rule in self.rules.across(job, processes_of(job, started), None):
            self._learn(problem)
            self._broken.setdefault(problem.path, {})[rule] = None
            if not self._takes(problem):
                self.unfixed.add(problem.path)
            yield problem
        if values and not self.of_sections:  # else they were looked at before
            yield from self._unsound(values)

    def _learn(self, problem: Problem) -> None:
        hints = self._hints.setdefault(problem.path, [])
        if problem.nearest is not None and problem.nearest not in hints:
            hints.append(problem.nearest)
        if problem.unit is not None:
            self._units.setdefault(problem.path, {})[problem.unit] = None
        given = self.started if problem.path == PROCESSES else problem.value
        self._given.setdefault(problem.path, given)
        for path in problem.beside:
            if path not in self.beside and (number := _number(self.job, path)) is not None:
                self.beside[path] = problem.path
                self._given.setdefault(path, number)

    def _takes(self, problem: Problem) -> bool:
        """Tell whether there is something to try in the place of a problem."""
        is_number = isinstance(problem.value, int) and not isinstance(problem.value, bool)
        if problem.nearest is None and not is_number:
            return False
        try:
            self._put((self.job, self.started), problem.path, problem.nearest or 1)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return False
        return True

    def _unsound(self, values: Values) -> list[Problem]:
        """Return what is wrong with sections by themselves, and learn from it."""
        found = self.rules.sections(self._with(values)[0])
        unsound = [problem for problem in found if problem.path not in self.unfixed]
        for problem in unsound:
            self._learn(problem)
        return unsound

    def _with(self, values: Mapping[str, object]) -> tuple[TrainJob, int]:
        """Return the job and the processes with values in place."""
        placed = (self.job, self.started)
        for path, value in values.items():
            placed = self._put(placed, path, value)
        return placed

    def _put(self, placed: tuple[TrainJob, int], path: str, value: object) -> tuple[TrainJob, int]:
        job, started = placed
        if path == PROCESSES:
            assert isinstance(value, int)
            return job, value
        changed = _changed(job, path.split("."), value)
        assert isinstance(changed, TrainJob)
        return changed, started


def _without(values: Values, path: str) -> Values:
    return {other: value for other, value in values.items() if other != path}


def _changed(section: object, names: list[str], value: object) -> object:
    """Return a copy of a section, list or dictionary with one value in it changed."""
    name, *rest = names
    copied = copy.copy(section)
    if isinstance(copied, list):
        copied[int(name)] = _changed(copied[int(name)], rest, value) if rest else value
    elif isinstance(copied, dict):
        copied[name] = _changed(copied[name], rest, value) if rest else value
    else:
        old = getattr(copied, name)
        setattr(copied, name, _changed(old, rest, value) if rest else _typed(section, name, value))
    return copied


def _number(job: object, path: str) -> int | None:
    """Return the whole number at a path; None if there stands something else, or nothing."""
    for name in path.split("."):
        job = job[int(name)] if isinstance(job, list) else getattr(job, name, None)
    return job if isinstance(job, int) and not isinstance(job, bool) else None


def _typed(section: object, name: str, value: object) -> object:
    """Return a value that is given as text, "null", as what its field holds."""
    if not isinstance(value, str) or isinstance(getattr(section, name), str):
        return value
    if isinstance(getattr(section, name), list) and not value.startswith("["):
        raise ValueError(f"{value} is part of a list")
    config = OmegaConf.structured(section)
    config[name] = OmegaConf.from_dotlist([f"value={value}"])["value"]
    return getattr(OmegaConf.to_object(config), name)


def _lines(found: list[Problem], values: Values, search: _Search) -> list[Problem]:
    """Return the problems that have a cause of their own, with what fixes each."""
    shown: dict[tuple[str, str], Problem] = {}
    for problem in found:
        key = (problem.path, "" if problem.path in values else str(problem.value))
        if key not in shown:
            shown[key] = problem
        elif problem.rule not in shown[key].rule:
            shown[key] = replace(shown[key], rule=f"{shown[key].rule}; {problem.rule}")
    along: dict[str, tuple[tuple[str, object], ...]] = {}
    for path, value in values.items():
        if path not in search.known:
            owner = _owner(path, search, found)
            along[owner] = (*along.get(owner, ()), (path, value))
    caused = {*values, *search.unfixed, *along}
    return [
        replace(one, nearest=_nearest(one, values, search), along=along.get(one.path, ()))
        for one in shown.values()
        if one.path in caused
    ]


def _nearest(problem: Problem, values: Values, search: _Search) -> object | None:
    """Return what is offered for a problem; for an element of a list what its rule asked for."""
    if problem.path in values:
        return values[problem.path]
    is_element = problem.nearest is not None and not search._takes(problem)
    return problem.nearest if is_element else None


def _owner(path: str, search: _Search, found: list[Problem]) -> str:
    """Return the path of the problem that a change of another setting belongs to."""
    for _ in range(_ROUNDS):
        if path in search.known:
            return path
        path = search.parents.get(path) or search.beside.get(path) or found[0].path
    return found[0].path
