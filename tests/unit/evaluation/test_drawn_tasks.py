"""Answers against a second way to find them, and prompts against the streams they come from."""

import re

import pytest

from hybrid_train.data.synthetic import SyntheticDocuments, WordTokenizer, words_of
from hybrid_train.evaluation.items import Item
from hybrid_train.evaluation.tasks import build_tasks
from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Split,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.evaluation import Operation
from tests.unit.evaluation.own_tasks import settings_of


def items_of(name: str, **changes: object) -> list[Item]:
    return list(build_tasks([name], settings_of(name, items=200, **changes))[0].items())


def size(item: Item) -> int:
    return int(item.group.rpartition("=")[2])


def test_a_copy_is_the_list() -> None:
    for item in items_of("copying"):
        *words, bar = item.prompt.split()
        assert bar == "|"
        assert words == item.answer.split()
        assert len(words) == size(item)
        assert item.max_tokens > len(item.answer)


def test_a_key_is_asked_for_whose_value_was_told() -> None:
    for item in items_of("recall"):
        *told, mark, asked = item.prompt.split()
        assert mark == "?"
        assert len(told) == 2 * size(item)
        assert item.answer.strip() == dict(zip(told[::2], told[1::2], strict=True))[asked]
        # What stands there is chosen first; 64 values rarely repeat among four pairs.
        assert sum(choice.strip() in told for choice in item.choices) >= 3 or size(item) < 8


def test_the_bracket_closes_the_last_that_is_open() -> None:
    for item in items_of("brackets"):
        unclosed: list[str] = []
        for word in item.prompt.split():
            if word[0] == "(":
                unclosed.append(word[1:])
            else:
                assert word[1:] == unclosed.pop()
        assert item.answer == f" ){unclosed[-1]}"
        assert sorted(item.choices) == [" )0", " )1", " )2", " )3"]


def test_a_sum_is_that_of_its_terms() -> None:
    for item in items_of("sums", modulus=7, terms=3):
        *shots, last = re.findall(r"(\d+) (\d+) (\d+) =(?: (\d+))?", item.prompt)
        assert len(shots) == size(item)
        assert all(sum(map(int, terms)) % 7 == int(result) for *terms, result in shots)
        assert sum(map(int, last[:3])) % 7 == int(item.answer)


@pytest.mark.parametrize("operation", Operation)
def test_arithmetic_is_pythons(operation: Operation) -> None:
    symbol = {"sum": "+", "product": "*", "modulus": "%"}[operation.value]
    for item in items_of("arithmetic", operations=[operation], digits=[1, 2, 5], shots=2):
        *shots, question = item.prompt.split("\n")
        assert len(shots) == 2
        assert question not in {shot[: len(question)] for shot in shots}
        for line in (*shots, f"{question} {item.answer}"):
            left, right = line.split(" = ")
            assert left.split()[1] == symbol
            assert eval(left) == int(right)
            for number in left.split(f" {symbol} "):
                assert len(number) == size(item) or (size(item) == 1 and number in "0123456789")
        assert item.max_tokens > len(item.answer) + 1
        assert item.stop == ("\n",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("copying", CopyStream(symbols=32)),
        ("recall", RecallStream(keys=64, values=64)),
        ("brackets", BracketStream(types=4)),
        ("sums", SumStream(modulus=23, terms=2)),
    ],
)
def test_a_model_of_the_stream_knows_every_word_in_the_places_of_its_documents(
    name: str, kind: Synthetic
) -> None:
    words = words_of(kind)
    tokenizer = WordTokenizer(words)
    by_size: dict[int, SyntheticDocuments] = {}
    seen: dict[int, int] = {}
    for item in items_of(name):
        items = size(item) + (name == "sums")
        if items not in by_size:
            stream = type(kind)(**vars(kind) | {"min_items": items, "max_items": items})
            ids = range(1, len(words) + 1)
            by_size[items] = SyntheticDocuments(stream, Split.validation, ids, 0)
        number = seen[items] = seen.get(items, -1) + 1
        length = int(by_size[items].lengths[number])
        document = by_size[items].read(number, 0, length).tolist()
        separator = "" if item.choices else " "
        asked = tokenizer.encode(item.prompt + separator + item.answer)
        assert asked == document[: len(asked)]
