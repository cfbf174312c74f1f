"""Tasks drawn at random: copying, recall, brackets, sums, arithmetic.

The first four ask about documents of the synthetic streams (`data/synthetic.py`), words with spaces
between them, so that a model that was trained on a stream can be scored by its vocabulary. The
documents are those of the validation split.
"""

from collections.abc import Iterator
from operator import add, mod, mul

import numpy as np

from hybrid_train.data.synthetic import SyntheticDocuments, words_of
from hybrid_train.evaluation.items import ExactTask, Item, dealt, mixed
from hybrid_train.schema import evaluation as settings
from hybrid_train.schema.data import (
    BracketStream,
    CopyStream,
    RecallStream,
    Split,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.evaluation import CHOICES, Operation

_OPERATIONS = {
    Operation.sum: ("+", add),
    Operation.product: ("*", mul),
    Operation.modulus: ("%", mod),
}


class CopyingTask(ExactTask):
    """Repeat a list of random words; the model writes it."""

    name = "copying"

    def __init__(self, given: settings.Copying) -> None:
        self._settings = given

    def items(self) -> list[Item]:
        given, made = self._settings, []
        streams = {
            words: _stream(CopyStream(symbols=given.symbols), words, given) for words in given.words
        }
        for number, words in enumerate(dealt(given.words, given.items)):
            document = next(streams[words])
            answer = " ".join(document[words + 1 :])
            made.append(
                Item(
                    name=str(number),
                    prompt=" ".join(document[: words + 1]),
                    answer=answer,
                    group=f"words={words}",
                    max_tokens=len(answer) + 1,  # a token has a letter at least, and there is END
                )
            )
        return made


class RecallTask(ExactTask):
    """Which value a key has, of four that stand in the prompt."""

    name = "recall"

    def __init__(self, given: settings.Recall) -> None:
        self._settings = given

    def items(self) -> list[Item]:
        given, made = self._settings, []
        random = np.random.default_rng([given.seed, *self.name.encode()])
        kind = RecallStream(keys=given.keys, values=given.values)
        streams = {pairs: _stream(kind, pairs, given) for pairs in given.pairs}
        known = [word for word in words_of(kind) if word.startswith("v")]
        for number, pairs in enumerate(dealt(given.pairs, given.items)):
            document = next(streams[pairs])
            asked = 2 * pairs + 2  # behind the pairs, "?" and the first key
            right = document[asked]
            read = _others(document[1 : 2 * pairs : 2], right, random)
            # Where many keys share a value, fewer than four may stand in the prompt.
            more = _others([word for word in known if word not in read], right, random)
            others = [*read, *more][: CHOICES - 1]
            made.append(_choice(number, document[:asked], right, others, f"pairs={pairs}", random))
        return made


class BracketsTask(ExactTask):
    """Which bracket closes the one that is open; all types are choices."""

    name = "brackets"

    def __init__(self, given: settings.Brackets) -> None:
        self._settings = given

    def items(self) -> list[Item]:
        given, made = self._settings, []
        random = np.random.default_rng([given.seed, *self.name.encode()])
        kind = BracketStream(types=given.types)
        streams = {pairs: _stream(kind, pairs, given) for pairs in given.pairs}
        closing = words_of(kind)[given.types :]
        for number, pairs in enumerate(dealt(given.pairs, given.items)):
            document = next(streams[pairs])
            at = int(random.choice([n for n, word in enumerate(document) if word in closing]))
            others = [word for word in closing if word != document[at]]
            group = f"pairs={pairs}"
            made.append(_choice(number, document[:at], document[at], others, group, random))
        return made


class SumsTask(ExactTask):
    """Which number a sum gives, modulo another, behind sums with their results."""

    name = "sums"

    def __init__(self, given: settings.Sums) -> None:
        self._settings = given

    def items(self) -> list[Item]:
        given, made = self._settings, []
        random = np.random.default_rng([given.seed, *self.name.encode()])
        kind = SumStream(modulus=given.modulus, terms=given.terms)
        streams = {shots: _stream(kind, shots + 1, given) for shots in given.shots}
        numbers = words_of(kind)[: given.modulus]
        for number, shots in enumerate(dealt(given.shots, given.items)):
            *document, right = next(streams[shots])
            others = _others(numbers, right, random)[: CHOICES - 1]
            made.append(_choice(number, document, right, others, f"shots={shots}", random))
        return made


class ArithmeticTask(ExactTask):
    """Sums, products and remainders of two whole numbers; the model writes the result."""

    name = "arithmetic"

    def __init__(self, given: settings.Arithmetic) -> None:
        self._settings = given

    def items(self) -> list[Item]:
        given = self._settings
        random = np.random.default_rng([given.seed, *self.name.encode()])
        groups = [(one, digits) for digits in given.digits for one in given.operations]
        return [
            self._item(number, operation, digits, random)
            for number, (operation, digits) in enumerate(dealt(groups, given.items))
        ]

    def _item(
        self, number: int, operation: Operation, digits: int, random: np.random.Generator
    ) -> Item:
        question, answer = _computed(operation, digits, random)
        shots: list[str] = []
        while len(shots) < self._settings.shots:
            shown, result = _computed(operation, digits, random)
            if shown != question:  # its answer would only have to be copied
                shots.append(f"{shown} {result}\n")
        return Item(
            name=str(number),
            prompt="".join([*shots, question]),
            answer=answer,
            group=f"{operation.value} digits={digits}",
            max_tokens=2 * digits + 2,  # of the longest product, a token a digit, space, line end
            stop=("\n",),
        )


def _stream(kind: Synthetic, items: int, given: settings.TaskSettings) -> Iterator[list[str]]:
    """Yield documents of a stream, all with so many items, as words without END."""
    words = words_of(kind)
    kind = type(kind)(**vars(kind) | {"min_items": items, "max_items": items, "seed": given.seed,
                                      "validation_documents": given.items})  # fmt: skip
    documents = SyntheticDocuments(kind, Split.validation, range(len(words)), len(words))
    for document, length in enumerate(documents.lengths):
        yield [words[symbol] for symbol in documents.read(document, 0, int(length) - 1)]


def _others(words: list[str], right: str, random: np.random.Generator) -> list[str]:
    """Return words other than the right one, each once, in random order."""
    left = [word for word in dict.fromkeys(words) if word != right]
    return [left[number] for number in random.permutation(len(left))]


def _choice(
    number: int,
    prompt: list[str],
    right: str,
    others: list[str],
    group: str,
    random: np.random.Generator,
) -> Item:
    choices = mixed(f" {right}", [f" {word}" for word in others], random)
    return Item(
        name=str(number), prompt=" ".join(prompt), answer=f" {right}", choices=choices, group=group
    )


def _computed(operation: Operation, digits: int, random: np.random.Generator) -> tuple[str, str]:
    """Draw two numbers of so many digits; return the question and its result."""
    symbol, compute = _OPERATIONS[operation]
    first, second = _number(digits, random), _number(digits, random)
    if operation is Operation.modulus:
        second = max(second, 2)  # by 0 there is no remainder, by 1 always the same
    return f"{first} {symbol} {second} =", str(compute(first, second))


def _number(digits: int, random: np.random.Generator) -> int:
    drawn = random.integers(10, size=digits)
    if digits > 1:
        drawn[0] = random.integers(1, 10)
    return int("".join(map(str, drawn)))
