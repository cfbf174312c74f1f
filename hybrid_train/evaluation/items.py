"""What a task is: questions with answers, and how an answer is graded.

A task needs no model and no torch; who runs it scores the choices of an item, or lets the model
write an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Where it has choices, the log-probability of each behind the prompt is compared; prompt and
    choice are put together as they stand, so a choice brings the space before it. Where it has
    none, the model writes an answer of at most `max_tokens`, up to the first string of `stop`.
    """

    name: str  # unique within the task; the same settings give the same items
    prompt: str
    answer: str  # one of the choices, or what a verifier compares a written answer with
    choices: tuple[str, ...] = ()
    group: str = ""  # by which results are split, too, as "length=512 depth=0.5"
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    document: str = ""  # what it was taken from: items of one are not independent; "": of none

    def __post_init__(self) -> None:
        if self.choices and (
            self.choices.count(self.answer) != 1 or len(set(self.choices)) < len(self.choices)
        ):
            raise ValueError(f"{self.name}: choices must differ, and one of them be the answer")
        if not self.choices and self.max_tokens < 1:
            raise ValueError(f"{self.name}: a written answer needs max_tokens")


class Task(Protocol):
    """A list of items and the way to grade answers to them."""

    name: str

    def items(self) -> Sequence[Item]:
        """Return the items, in an order that a limit may cut anywhere.

        Raises:
            UserError: if what they are made from is missing or too little.
        """

    def grade(self, item: Item, answer: str) -> float:
        """Grade an answer from 0 to 1; of an item with choices, the choice that was taken."""


class ExactTask:
    """Grades by equality: of a choice to the letter, of a written answer word by word.

    A written answer is right as a whole or not at all: nothing for a part, for the right words
    among others, or for all that there are.
    """

    def grade(self, item: Item, answer: str) -> float:
        if item.choices:
            return float(answer == item.answer)
        return float(answer.split() == item.answer.split())


def mixed(answer: str, others: Sequence[str], random: np.random.Generator) -> tuple[str, ...]:
    """Return choices in random order, so that a model without a preference is right by chance."""
    choices = [answer, *others]
    return tuple(choices[place] for place in random.permutation(len(choices)))


def dealt[Group](groups: Sequence[Group], items: int) -> list[Group]:
    """Deal items to groups in turn, so that a limit leaves each its share."""
    return [groups[number % len(groups)] for number in range(items)]
