"""What is wrong with a configuration, collected so that one edit can fix all of it."""

import dataclasses
import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_LONGEST = 300  # letters of a value that a message repeats


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
        value = str(self.value)
        if len(value) > _LONGEST:
            value = f"{value[:_LONGEST]}... ({len(value):,} letters)"
        return f"{self.path} = {value}: {self.rule}{hint}"


DISK = "disk"  # kind of the errors of a disk that is full, or refuses


class UserError(Exception):
    """Something the user can mend. The command line prints its text without a traceback."""

    everywhere = False  # whether all processes of a run raise it: then the first alone says it
    repeated = False  # whether some raise it, of which another one says it
    kind = "error"  # word for it in the history of a run


def kind_of(error: BaseException) -> str:
    """Return the word for an error in the history of a run."""
    of_disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    return str(getattr(error, "kind", DISK if of_disk else UserError.kind))


# What the system says of a path or a disk; no mistake of the program makes it say so.
_OF_THE_SYSTEM = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def of_the_system(error: OSError) -> UserError | None:
    """Return what the user can mend where the system refuses a path; None if it is not that."""
    if error.errno not in _OF_THE_SYSTEM:
        return None
    where = "the disk" if error.filename is None else str(error.filename)
    explained = UserError(
        f"{where} cannot be used: {error.strerror}; permit it, make room, or choose another place"
    )
    explained.everywhere = getattr(error, "everywhere", False)
    explained.kind = DISK
    return explained


class ConfigError(UserError):
    """The configuration cannot run; the text lists every problem, then the advice."""

    def __init__(self, problems: Iterable[Problem], advice: str = "") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        plural = "problem" if count == 1 else "problems"
        text = f"{count} {plural} in the configuration; nothing was started:\n{lines}"
        super().__init__(f"{text}\n{advice}" if advice else text)


def collect(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Walk a tree of dataclasses and yield what each `problems` method reports, with full paths."""
    own = getattr(section, "problems", None)
    if own is not None:
        for problem in own():
            yield problem.under(prefix)
    for field in dataclasses.fields(section):
        path = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(section, field.name)
        parts: dict[str, object] = {path: value}
        if isinstance(value, list):
            parts = {f"{path}.{number}": part for number, part in enumerate(value)}
        elif isinstance(value, dict):
            parts = {f"{path}.{key}": part for key, part in value.items()}
        for place, part in parts.items():
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                yield from collect(part, place)


def at_least(minimum: float, **values: float | None) -> Iterator[Problem]:
    """Yield a problem for each named value below `minimum`; None counts as unset."""
    for name, value in values.items():
        if value is not None and value < minimum:
            yield Problem(name, value, f"must be at least {minimum}", minimum)


def within(low: float, high: float, **values: float | None) -> Iterator[Problem]:
    """Yield a problem for each named value outside [low, high]; None counts as unset."""
    for name, value in values.items():
        if value is not None and not low <= value <= high:
            nearest = low if value < low else high
            yield Problem(name, value, f"must lie in [{low}, {high}]", nearest)
