"""A needle in filler: a fact that was told once, at some depth of a long text, is asked for.

Facts give names a colour. Four of them stand in the text, one at the depth of the group and three
anywhere; the question has the four colours as choices, so that it is not enough to have seen one.
"""

import numpy as np

from hybrid_train.evaluation.code_tasks import held_out
from hybrid_train.evaluation.items import ExactTask, Item, dealt, mixed
from hybrid_train.schema.evaluation import CHOICES, Filler, Needle
from hybrid_train.schema.problems import UserError

_NAMES = (
    "anna", "boris", "clara", "david", "emma", "felix", "greta", "hugo",
    "irene", "jonas", "karla", "leon", "maria", "nils", "olga", "paul",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
_SENTENCES = (
    "The road goes along the river for two hours.",
    "There was rain in the night, and the fields are wet.",
    "A train stops at the small station twice a day.",
    "The baker opens his shop before the sun is up.",
    "Nobody remembers who built the old stone bridge.",
    "In winter the lake is frozen for a few weeks.",
    "The children of the village walk to school together.",
    "On market days farmers bring apples and cheese.",
    "A cat sleeps on the warm roof of the mill.",
    "The letter came late because of the snow.",
    "Most houses have a garden and a low wall.",
    "The clock of the church is five minutes slow.",
    "Boats leave the harbour when the wind is good.",
    "The library lends its books for three weeks.",
    "In the evening people sit outside and talk.",
    "A narrow path leads through the wood to the hill.",
)
# How a fact is told, and how it is asked for, in each kind of filler.
_TOLD = {Filler.code: '{}_colour = "{}"', Filler.prose: "The colour of {} is {}."}
_ASKED = {Filler.code: "\nassert {}_colour ==", Filler.prose: "\nThe colour of {} is"}
_CHOICE = {Filler.code: ' "{}"', Filler.prose: " {}"}


class NeedleTask(ExactTask):
    """Which colour a name was given, by words of the prompt and depth of the fact."""

    name = "needle"

    def __init__(self, settings: Needle) -> None:
        self._settings = settings

    def items(self) -> list[Item]:
        settings = self._settings
        random = np.random.default_rng([settings.seed, *self.name.encode()])
        pieces = self._pieces()
        groups = [(words, depth) for words in settings.words for depth in settings.depths]
        return [
            self._item(number, words, depth, pieces, random)
            for number, (words, depth) in enumerate(dealt(groups, settings.items))
        ]

    def _item(
        self, number: int, words: int, depth: float, pieces: list[str], random: np.random.Generator
    ) -> Item:
        kind = self._settings.filler
        names = random.choice(_NAMES, CHOICES, replace=False).tolist()
        colours = random.choice(_COLOURS, CHOICES, replace=False).tolist()
        facts = [_TOLD[kind].format(*one) for one in zip(names, colours, strict=True)]
        question = _ASKED[kind].format(names[0])
        room = words - sum(len(text.split()) for text in [*facts, question])
        filler = self._filler(room, pieces, random)
        for fact in facts[1:]:
            filler.insert(int(random.integers(len(filler) + 1)), fact)
        filler.insert(round(depth * len(filler)), facts[0])
        answer, *others = (_CHOICE[kind].format(colour) for colour in colours)
        return Item(
            name=str(number),
            prompt=("\n" if kind is Filler.code else " ").join(filler) + question,
            answer=answer,
            choices=mixed(answer, others, random),
            group=f"words={words} depth={depth:g}",
        )

    def _pieces(self) -> list[str]:
        """Lines of code in their order, or sentences; none tells of a colour."""
        if self._settings.filler is Filler.prose:
            return list(_SENTENCES)
        lines = [line for code in held_out(self._settings.files) for line in code.lines]
        found = [line for line in lines if line and "_colour" not in line]
        if not found:
            raise UserError("task.needle.files has no lines of text; name other files")
        return found

    def _filler(self, room: int, pieces: list[str], random: np.random.Generator) -> list[str]:
        """Return pieces with so many words at most: code from a random line on, prose mixed."""
        start = int(random.integers(len(pieces)))
        found: list[str] = []
        while True:
            if self._settings.filler is Filler.prose:
                start = int(random.integers(len(pieces)))
            piece = pieces[start % len(pieces)]
            room -= len(piece.split())
            if room < 0:
                return found
            found.append(piece)
            start += 1
