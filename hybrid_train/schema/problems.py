"""What is wrong with a configuration, collected so that one edit can fix all of it."""

import dataclasses
import errno
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from hybrid_train.schema.units import counted

DISK = "disk"  # kind of the errors of a disk that is full, or refuses
_LONGEST = 300  # letters of a value that a message repeats
# What the system says of a path or a disk; no mistake of the program makes it say so.
_OF_THE_SYSTEM = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One broken rule: where, what stands there, the rule, and the nearest legal value."""

    path: str
    value: object
    rule: str
    nearest: object | None = None  # what the user could write instead; None if nothing is near
    unit: int | None = None  # what the value must be a multiple of, for a rule that asks for that
    beside: tuple[str, ...] = ()  # whole numbers elsewhere that the rule compares the value with
    along: tuple[tuple[str, object], ...] = ()  # other settings that must change with it

    def under(self, prefix: str) -> "Problem":
        """Return the same problem with its path put below `prefix`."""
        return dataclasses.replace(self, path=f"{prefix}.{self.path}" if prefix else self.path)

    def __str__(self) -> str:
        others = ", ".join(f"{path}={value}" for path, value in self.along)
        words = "" if self.nearest is None else str(self.nearest)
        words += f" with {others}" if words and others else others
        hint = f"; nearest: {words}" if words else ""
        value = str(self.value) or '""'
        if len(value) > _LONGEST:
            value = f"{value[:_LONGEST]}... ({len(value):,} letters)"
        return f"{self.path} = {value}: {self.rule}{hint}"


class UserError(Exception):
    """Something the user can fix. The command line prints its text without a traceback."""

    on_all_ranks = False  # whether all processes of a run raise it: then the first alone says it
    repeated = False  # whether some raise it, of which another one says it
    of_content = False  # whether data itself is wrong, so that all that read it raise it
    kind = "error"  # word for it in the history of a run


class ConfigError(UserError):
    """The configuration cannot run; the text lists every problem, then the advice."""

    def __init__(self, problems: Iterable[Problem], advice: str = "") -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        count = counted(len(self.problems), "problem")
        text = f"{count} in the configuration; nothing was started:\n{lines}"
        super().__init__(f"{text}\n{advice}" if advice else text)


def kind_of(error: BaseException) -> str:
    """Return the word for an error in the history of a run."""
    of_disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    return str(getattr(error, "kind", DISK if of_disk else UserError.kind))


def of_the_system(error: OSError) -> UserError | None:
    """Return what the user can fix where the system refuses a path; None if it is not that."""
    if error.errno not in _OF_THE_SYSTEM:
        return None
    where = "the disk" if error.filename is None else str(error.filename)
    explained = UserError(
        f"{where} cannot be used: {error.strerror}; permit it, make room, or choose another place"
    )
    explained.on_all_ranks = getattr(error, "on_all_ranks", False)
    explained.kind = DISK
    return explained


@contextmanager
def explained_by_the_system() -> Iterator[None]:
    """Turn what the system says of a path or a disk into an error that the user can fix."""
    try:
        yield
    except OSError as error:
        explained = of_the_system(error)
        if explained is None:
            raise
        raise explained from error


class Limit(Protocol):
    """What the annotation of a field says that it may hold; `schema/limits.py` has them."""

    def broken(self, value: Any) -> tuple[str, object | None] | None:
        """Return the rule that a value breaks and the nearest value that keeps it, if there is."""


def collect(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Walk a tree of dataclasses and yield, with full paths, what is wrong with it.

    That is each value beyond the limit in the type of its field, and what each `problems` method
    reports of the others.
    """
    found: list[Problem] = []
    schema: Any = type(section)
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        for problem in _beyond(_types(schema)[field.name], value, field.name):
            found.append(_with_usual(problem, field) if problem.path == field.name else problem)
    beyond = {problem.path for problem in found}
    own = getattr(section, "problems", tuple)
    found += [problem for problem in own() if problem.path not in beyond]
    for problem in found:
        yield problem.under(prefix)


def _with_usual(problem: Problem, field: "dataclasses.Field[Any]") -> Problem:
    """Put the usual value of a field beside a value that is near to none."""
    has_usual = field.default not in (dataclasses.MISSING, MISSING, None)
    is_near = problem.nearest is not None and problem.value == problem.value  # but NaN
    return (
        dataclasses.replace(problem, nearest=field.default)
        if has_usual and not is_near
        else problem
    )


def within_limits(schema: Any, name: str, value: object) -> object:
    """Return a value of a field, or the nearest one that its limits let pass."""
    kind = _types(schema).get(name)
    return next((problem.nearest for problem in _beyond(kind, value, name)), value)


@cache
def _types(schema: Hashable) -> dict[str, Any]:
    """Return the types of the fields of a dataclass with their annotations."""
    return get_type_hints(schema, include_extras=True)


def _beyond(kind: Any, value: Any, path: str) -> Iterator[Problem]:
    """Compare a value, and all that is inside it, with the limits of its type."""
    if dataclasses.is_dataclass(value):
        yield from collect(value, path)
    elif get_origin(kind) is Annotated:
        for limit in kind.__metadata__:
            if bad := limit.broken(value):
                yield Problem(path, value, *bad)
    else:
        for inner_kind, part, place in _parts(kind, value, path):
            yield from _beyond(inner_kind, part, place)


def _parts(kind: Any, value: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield type, value and path of all parts of an optional value, a list or a dictionary."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType) and value is not None:
        yield from ((one, value, path) for one in inner)
    elif origin is list:
        yield from ((inner[0], part, f"{path}.{number}") for number, part in enumerate(value))
    elif origin is dict:
        for name, part in value.items():
            yield inner[0], name, f"{path}.{name}"
            yield inner[1], part, f"{path}.{name}"
