"""Asks for every value, and trains with those that are accepted."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

from tests.jobs.command import finish, start_program
from tests.numbers.tried import Field, composer
from tests.numbers.two_steps import Outcome

SCRIPT = str(Path(__file__).with_name("two_steps.py"))
# The upper end of these is a matter of the machine: a cluster may have it, a test not.
LARGE = (
    *("model.", "data.sources.", "train.sequence_length", "train.phases.1.sequence_length"),
    *("train.global_batch", "train.phases.1.global_batch", "train.validation_batches"),
    "runtime.threads",
)
_LARGE_FROM = 1000
AT_ONCE = 25  # runs of one command, which has a limit of time
_TIMED = {
    f"recovery.time_limit_s={seconds}" for seconds in range(1, 10)
}  # a busy machine is slower


@dataclass(frozen=True)
class Pair:
    """A value of a field, as an override."""

    field: Field
    line: str

    @property
    def lines(self) -> tuple[str, ...]:
        return (*self.field.beside, self.line)

    @property
    def is_for_others(self) -> bool:
        """Whether a test of two steps on any machine is not the place for it."""
        end = self.field.ends[-1] if self.field.ends else ""
        is_end = bool(end) and self.line == f"{self.field.path}={end}" and float(end) > _LARGE_FROM
        return (is_end and self.field.path.startswith(LARGE)) or self.line in _TIMED


def pairs(fields: Iterable[Field]) -> list[Pair]:
    return [Pair(field, line) for field in fields for line in field.lines()]


def refusals(asked: Iterable[Pair]) -> dict[Pair, str | None]:
    """Return what is said of each value; None if it is accepted."""
    return {one: composer(one.field.base).refusal(*one.lines) for one in asked}


def train(runs: Sequence[tuple[str, ...]], folder: Path) -> list[Outcome]:
    """Train two steps with each list of overrides."""
    outcomes: list[Outcome] = []
    request, answer = folder / "request.json", folder / "answer.json"
    for some in batched(runs, AT_ONCE):
        request.write_text(json.dumps(some))
        finished = finish(start_program(SCRIPT, str(request), str(answer)))
        assert finished.code == 0, finished.said
        outcomes += [Outcome(**one) for one in json.loads(answer.read_text())]
    return outcomes
