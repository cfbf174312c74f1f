"""Where a needle lies, how long its text is, and that only what was told answers."""

import re

import pytest

from hybrid_train.evaluation.items import Item
from hybrid_train.evaluation.needle import NeedleTask
from hybrid_train.schema.evaluation import Filler, Needle

TOLD = {
    Filler.code: re.compile(r'^(\w+)_colour = "(\w+)"$', re.MULTILINE),
    Filler.prose: re.compile(r"The colour of (\w+) is (\w+)\."),
}
ASKED = {
    Filler.code: re.compile(r"\nassert (\w+)_colour ==$"),
    Filler.prose: re.compile(r"\nThe colour of (\w+) is$"),
}


def items_of(filler: Filler) -> list[Item]:
    settings = Needle(items=90, words=[64, 128, 512], depths=[0, 0.25, 1], filler=filler)
    return NeedleTask(settings).items()


@pytest.mark.parametrize("filler", Filler)
def test_four_facts_are_told_once_and_their_colours_are_the_choices(filler: Filler) -> None:
    for item in items_of(filler):
        told = dict(TOLD[filler].findall(item.prompt))
        assert len(told) == len(TOLD[filler].findall(item.prompt)) == 4
        asked = ASKED[filler].search(item.prompt)
        assert asked is not None
        assert item.answer.strip(' "') == told[asked[1]]
        assert {choice.strip(' "') for choice in item.choices} == set(told.values())


@pytest.mark.parametrize("filler", Filler)
def test_a_prompt_has_the_words_of_its_group_or_a_piece_less(filler: Filler) -> None:
    for item in items_of(filler):
        words = int(item.group.split()[0].removeprefix("words="))
        assert words - 40 < len(item.prompt.split()) <= words


@pytest.mark.parametrize("filler", Filler)
def test_the_fact_lies_at_the_depth_of_its_group(filler: Filler) -> None:
    for item in items_of(filler):
        depth = float(item.group.rpartition("=")[2])
        asked = ASKED[filler].search(item.prompt)
        assert asked is not None
        text = item.prompt[: asked.start()]
        pieces = text.split("\n") if filler is Filler.code else re.findall(r"[^.]+\.", text)
        (place,) = [
            number
            for number, piece in enumerate(pieces)
            if (found := TOLD[filler].search(piece)) and found[1] == asked[1]
        ]
        assert place == round(depth * (len(pieces) - 1))
