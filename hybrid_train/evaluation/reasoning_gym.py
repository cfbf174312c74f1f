"""Gateway to reasoning-gym: its tasks as ours, graded by its own scorers.

Only full marks count. Many scorers give a share for form or likeness: of version 0.1.25 twelve give
0.01 to 0.05 for empty text, and half of them something for a list of answers, so that a mean of
shares says little of how much was solved. A task whose scorer gives full marks to what is no answer
is refused: those known by name, others when their items are made.
"""

import ast
import contextlib
import dataclasses
import io
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from types import ModuleType
from typing import Any

from hybrid_train.evaluation.items import Item
from hybrid_train.runtime.optional import require
from hybrid_train.schema.evaluation import ReasoningGym
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError

_PATH = "task.reasoning_gym"
_TRIED = 100  # items whose scorer is given wrong answers before a model is
_NO_ANSWER = "it stores no answers, so nobody can tell whether its scorer is right"
# Of version 0.1.25; a test tries them all.
REFUSED: Mapping[str, str] = {
    "composite": "it mixes tasks; name one of them",
    "game_of_life_halting": "its scorer gives full marks to any text",
    "ab": "its right answer may be empty text",
    "sokoban": "its scorer gives full marks to a list of all answers",
    **dict.fromkeys(
        ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ANSWER
    ),
}
_log = logging.getLogger(__name__)


class ReasoningGymTask:
    """A task of the library; an answer may stand alone, or between <answer> and </answer>."""

    name = "reasoning_gym"

    def __init__(self, settings: ReasoningGym) -> None:
        """Check that there is such a task and that it can be used.

        Raises:
            UserError: if the library is not installed, or the name or difficulty is not right.
        """
        self._settings = settings
        self._library = _library()
        self._has_warned = False
        name, known = settings.name, self._library.factory.DATASETS
        if name in REFUSED:
            raise UserError(f"{_PATH}.name = {name} is refused: {REFUSED[name]}")
        if name not in known:
            near = nearest(name, known)
            hint = f"; nearest: {near}" if near else ""
            raise UserError(f"{_PATH}.name = {name}: reasoning-gym has no such task{hint}")
        self._dataset = self._created(known[name][1])

    def items(self) -> list[Item]:
        """Return the items.

        Raises:
            UserError: if the scorer of the task cannot be trusted.
        """
        found = [
            Item(
                name=str(number),
                prompt=str(entry["question"]),
                answer=str(entry["answer"]),
                group=self._settings.name,
                max_tokens=self._settings.max_tokens,
            )
            for number, entry in enumerate(self._entries)
        ]
        self._require_a_scorer_without_holes(found)
        return found

    def grade(self, item: Item, answer: str) -> float:
        """Return 1 for full marks, else 0; also where the scorer raises, which is said once."""
        given = self._library.utils.extract_answer(answer, tag_name="answer")
        text = answer.strip() if given is None else given
        if not text:
            return 0.0
        try:
            with _silent():
                score = self._dataset.score_answer(text, self._entries[int(item.name)])
        except Exception as error:  # whatever the scorers of a hundred tasks may raise
            if not self._has_warned:
                reason = f"{type(error).__name__}: {error}"
                _log.warning(
                    "the scorer of %s raised %s; such answers count as wrong",
                    self._settings.name,
                    reason,
                )
            self._has_warned = True
            return 0.0
        return float(score >= 1)

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        with _silent():
            return [self._dataset[number] for number in range(self._settings.items)]

    def _created(self, schema: Any) -> Any:
        """Create the dataset from the settings; `schema` is the class of its attributes."""
        settings = self._settings
        known = {field.name for field in dataclasses.fields(schema)} - {"size", "seed"}
        for key in settings.difficulty:
            if key not in known:
                near = nearest(key, known)
                hint = f"; nearest: {near}" if near else ""
                raise UserError(
                    f"{_PATH}.difficulty.{key}: {settings.name} has no such attribute{hint}; "
                    f"it has {', '.join(sorted(known))}"
                )
        difficulty = {key: _value(text) for key, text in settings.difficulty.items()}
        try:
            return self._library.create_dataset(
                settings.name, size=settings.items, seed=settings.seed, **difficulty
            )
        except (AssertionError, TypeError, ValueError) as error:
            given = ", ".join(f"{key}: {text}" for key, text in settings.difficulty.items())
            raise UserError(
                f"{_PATH}.difficulty = {{{given}}}: {settings.name} refuses it: {error}"
            ) from error

    def _require_a_scorer_without_holes(self, items: list[Item]) -> None:
        answers = list(dict.fromkeys(item.answer for item in items[:_TRIED]))
        for number, item in enumerate(items):
            fault = "" if self.grade(item, item.answer) else "no full marks to its own answer"
            # Its own comes last: many scorers pass over text behind an answer, which is no hole.
            others = [one for one in answers if one != item.answer]
            wrong = {"text at random": "zqx", "the question itself": item.prompt}
            if others:
                wrong["a list of all answers"] = "\n".join([*others, item.answer])
            for what, text in wrong.items() if number < _TRIED else ():
                fault = f"full marks to {what}" if self.grade(item, text) else fault
            if fault:
                raise UserError(
                    f"{_PATH}.name = {self._settings.name} is refused: its scorer gives {fault} "
                    f"(question {item.name}); name another task, or another difficulty"
                )


def _library() -> ModuleType:
    require("reasoning_gym", "the task reasoning_gym")
    import reasoning_gym  # seconds: it loads matplotlib and sympy

    return reasoning_gym


def _silent() -> AbstractContextManager[object]:
    """Keep what some tasks print about themselves out of our tables."""
    return contextlib.redirect_stdout(io.StringIO())


def _value(text: str) -> Any:
    """Read a value as Python writes it; what is none is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
