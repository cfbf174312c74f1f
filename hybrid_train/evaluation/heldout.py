"""Held-out text: loss, perplexity, bits per byte, next-token accuracy; and two models compared.

A document is read in windows of some tokens. Each begins with the last token of the one before, so
every token is predicted once; the first one is predicted from the end of a document, or from what
the tokenizer begins a text with. A model that was trained on packed documents has never seen such
an end; there the first token is not scored.

    loss           sum of nats / tokens, the end of a document among them
    perplexity     exp(loss)
    bits per byte  sum of nats / (bytes * ln 2), bytes of the text in UTF-8, none of special tokens

Split by position, the groups are ranges of how many tokens of its window a token has before it. A
document then has an item for each range, and one of its bytes, which belong to no range.

The loss is one per token of a tokenizer, bits per byte are the same measure for all: for a model
with another tokenizer the text is encoded anew.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.data.documents import Joined, Span
from hybrid_train.data.order import Permutation
from hybrid_train.evaluation.reader import Reader
from hybrid_train.evaluation.runner import ItemResult, Subject, digest
from hybrid_train.generation.scoring import Rows, Scores, Text, score
from hybrid_train.schema.evaluation import HeldOut as Settings
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import tokens

NAME = "heldout"
PER_TOKEN = ("loss", "perplexity", "accuracy", "agreement", "divergence")
_SHORTEST = 2  # tokens of a document: its end alone is no text
_ROW_TOKENS = 2048  # of a microbatch; few fit into the caches of a CPU


@dataclass(frozen=True)
class Document:
    """A held-out document: its place in its source, tokens, and the text that they stand for."""

    source: str
    number: int
    tokens: Sequence[int]
    text: str


class HeldOut:
    """Held-out documents, put to models; a `Measure` as tasks are."""

    def __init__(
        self,
        sources: Mapping[str, Joined],
        tokenizer: AnyTokenizer,
        settings: Settings,
        *,
        length: int,
        seed: int,
        limit: int | None = None,
        against: str | None = None,
    ) -> None:
        """Draw the documents.

        Args:
            sources: the held-out documents by source.
            tokenizer: that made their tokens.
            settings: how much of them is read.
            length: tokens of a window.
            seed: which documents these are follows from it.
            limit: documents of each source at most; None: as many as `settings` says.
            against: name of the model that `Subject.against` is; None: there is none.

        Raises:
            UserError: if there are no documents, or positions are asked for that no window has.
        """
        if not any(len(one) for one in sources.values()):
            raise UserError(
                "there is no held-out text: the run has no validation data; name token files of "
                "its tokenizer: task.heldout.files=[PREFIX]"
            )
        self.name = NAME
        self._tokenizer, self._length = tokenizer, length
        self._has_groups = len(sources) > 1
        budget = tokens(settings.tokens)
        self.documents = [
            Document(name, number, ids, _text(tokenizer, ids))
            for name, source in sources.items()
            for number, ids in drawn(name, source, seed, budget, limit)
        ]
        if settings.positions and settings.positions[-1] >= length:
            raise UserError(
                f"task.heldout.positions = {settings.positions}: must lie below the tokens of a "
                f"window, {length}; set task.heldout.length to read more at once"
            )
        self._positions = settings.positions
        self.settings: dict[str, Any] = {"tokens": budget, "length": length, "against": against}
        if settings.positions:  # results of before there were any keep their hash
            self.settings["positions"] = list(settings.positions)
        texts = [(one.source, one.number, _sha(one.text)) for one in self.documents]
        self.items_hash = digest(texts)

    def run(self, subject: Subject) -> list[ItemResult]:
        """Score every document; see `Measure`.

        Raises:
            UserError: if a score is not finite, or the two models have other tokenizers.
        """
        windows = [self._windows(subject.reader, one) for one in self.documents]
        rows = Rows(self._length, max(self._length, _ROW_TOKENS))
        texts = [text for of_document in windows for text in of_document]
        scores = iter(score(subject.network, texts, rows=rows, against=subject.against))
        return [
            item
            for document, of_document in zip(self.documents, windows, strict=True)
            for item in self._results(subject, document, [next(scores) for _ in of_document])
        ]

    def _windows(self, reader: Reader, document: Document) -> list[Text]:
        ids = [*reader.before_document, *self._encoded(reader, document)]
        return [
            Text(ids[start : start + self._length + 1])
            for start in range(0, len(ids) - 1, self._length)
        ]

    def _encoded(self, reader: Reader, document: Document) -> Sequence[int]:
        if reader.tokenizer.fingerprint == self._tokenizer.fingerprint:
            return document.tokens
        is_whole = document.tokens[-1] == self._tokenizer.end_of_document
        end = [reader.tokenizer.end_of_document] if is_whole else []
        return [*reader.tokenizer.encode(document.text), *end]

    def _results(
        self, subject: Subject, document: Document, scores: Sequence[Scores]
    ) -> Iterator[ItemResult]:
        name = f"{document.source}/{document.number}"
        nats, _ = _sum_of((one.log_probs for one in scores), slice(None))
        of_bytes = (-nats / math.log(2), float(self._bytes(subject.reader, document)))
        if not self._positions:
            values = _values(scores, slice(None))
            values = {"loss": values.pop("loss"), "bits_per_byte": of_bytes, **values}
            yield ItemResult(name, values, document.source if self._has_groups else "")
            return
        yield ItemResult(name, {"bits_per_byte": of_bytes}, document=name)
        for first, end in itertools.pairwise([0, *self._positions, self._length]):
            values = _values(scores, slice(first, end))
            if values["loss"][1]:
                group = f"position={first}-{end - 1}"
                yield ItemResult(f"{name}/{first}", values, group, document=name)

    def _bytes(self, reader: Reader, document: Document) -> int:
        """Count the bytes of the text that the scored tokens stand for."""
        whole = len(document.text.encode())
        if reader.before_document:
            return whole
        return whole - len(_text(reader.tokenizer, self._encoded(reader, document)[:1]).encode())


def drawn(
    name: str, source: Joined, seed: int, budget: int, limit: int | None
) -> Iterator[tuple[int, list[int]]]:
    """Yield numbers and tokens of documents in a random order; the last is cut at the budget."""
    order = Permutation(len(source), ("evaluation", seed, name))
    taken = given = 0
    for place in range(len(source)):
        if budget - taken < _SHORTEST or given == limit:
            return
        (number,) = order(np.array([place])).tolist()
        length = min(int(source.lengths[number]), budget - taken)
        if length >= _SHORTEST:
            yield number, source.read(Span(number, 0, length)).tolist()
            taken, given = taken + length, given + 1


def _values(scores: Sequence[Scores], positions: slice) -> dict[str, tuple[float, float]]:
    """Return the metrics of a document, per token, over some positions of its windows."""
    nats, count = _sum_of((one.log_probs for one in scores), positions)
    found = {
        "accuracy": _sum_of((one.greedy for one in scores), positions),
        "agreement": _sum_of((one.agrees for one in scores), positions),
        "divergence": _sum_of((one.divergence for one in scores), positions),
    }
    known = {metric: value for metric, value in found.items() if value[1]}
    return {"loss": (-nats, count), **known}


def _sum_of(windows: Iterable[Tensor | None], positions: slice) -> tuple[float, float]:
    """Add up the values of the windows of a document, in float64; return their number, too."""
    parts = [one[positions] for one in windows if one is not None]
    return math.fsum(float(one.double().sum()) for one in parts), float(sum(map(len, parts)))


def _text(tokenizer: AnyTokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens without the letter that they end in the middle of."""
    return tokenizer.decode(ids, skip_special=True).rstrip("\ufffd")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
