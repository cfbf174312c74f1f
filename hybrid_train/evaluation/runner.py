"""Tasks on a model under any layout: choices are scored, answers are written, items get values.

The model may be in training: it goes on to the bit as if it had not been asked.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hybrid_train.evaluation.intervals import pass_at_k
from hybrid_train.evaluation.items import Item, Task
from hybrid_train.evaluation.reader import Reader
from hybrid_train.generation.answers import Answer, Question
from hybrid_train.generation.batching import Batching, stream
from hybrid_train.generation.prompts import Prompt
from hybrid_train.generation.scoring import Text
from hybrid_train.generation.shared_contexts import score_continuations
from hybrid_train.runtime import heartbeat
from hybrid_train.schema.evaluation import Asking
from hybrid_train.schema.job_roots import AnswerSettings
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted
from hybrid_train.training.network import Network

_log = logging.getLogger(__name__)
_SEED_BYTES = 7  # of a hash: seeds of answers count on from it and stay below 2^64


@dataclass(frozen=True)
class Subject:
    """A model that is asked: its network under any layout, and what reads and writes for it.

    Attributes:
        network: in training, or loaded and frozen.
        reader: of its run.
        against: another model of the same tokenizer that held-out text compares it with.
        run_dir: its run folder, for tasks that read more of it.
    """

    network: Network
    reader: Reader
    against: Network | None = None
    run_dir: Path | None = None

    @property
    def vocab_size(self) -> int:
        """The number of ids that model and tokenizer both know."""
        return min(self.network.vocab_size, self.reader.tokenizer.vocab_size)


@dataclass(frozen=True)
class ItemResult:
    """What came of one item.

    Attributes:
        name: of the item.
        values: by metric a sum and what it is divided by, which add up over items: [nats, tokens].
        group: of the item.
        document: what the item was taken from; items of one document are not independent.
        said: of the model: log-probabilities of choices, the choice, or answers that it wrote.
    """

    name: str
    values: Mapping[str, tuple[float, float]]
    group: str = ""
    document: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)


class Measure(Protocol):
    """What is measured of a model: a task, or held-out text.

    Attributes:
        name: of the task.
        settings: plain data that decides the result, beside the items.
        items_hash: of all items; results of other items cannot be compared.
    """

    name: str
    settings: dict[str, Any]
    items_hash: str

    def run(self, subject: Subject) -> list[ItemResult]:
        """Ask a model; every process of its layout calls this, and all get the same."""


class Questions:
    """The items of a task, put to models."""

    def __init__(
        self,
        task: Task,
        settings: Mapping[str, Any],
        asking: Asking,
    ) -> None:
        """Make the items.

        Args:
            task: what is asked.
            settings: of the task, as plain data.
            asking: how many items, and how answers are drawn.

        Raises:
            UserError: if what the items are made from is missing or too little.
        """
        self.name = task.name
        self._task, self._asking = task, asking
        self.items = list(task.items())[: asking.limit]
        self.settings = dict(settings)
        self.has_written = any(not one.choices for one in self.items)
        if self.has_written:
            self.settings |= {"samples": asking.samples, "temperature": asking.temperature}
        self.items_hash = digest([asdict(one) for one in self.items])

    def run(self, subject: Subject) -> list[ItemResult]:
        """Ask a model; see `Measure`.

        Raises:
            UserError: if the model does not know a token, or its logits are not finite.
        """
        chosen = [one for one in self.items if one.choices]
        written = [one for one in self.items if not one.choices]
        found = {one.name: one for one in self._chosen(subject, chosen)}
        found |= {one.name: one for one in self._written(subject, written)}
        return [found[one.name] for one in self.items]

    def _chosen(self, subject: Subject, items: Sequence[Item]) -> Iterator[ItemResult]:
        """Score every choice of items; each text, and each context, is read once."""
        encoded = [
            [subject.reader.continued(one.prompt, choice) for choice in one.choices]
            for one in items
        ]
        apart = sum(not is_joint for of_item in encoded for _, is_joint in of_item)
        if apart:
            _log.info(
                "%s: the tokenizer merges letters of prompt and choice in %s of %d; both are "
                "encoded apart there",
                *(self.name, counted(apart, "choice"), sum(map(len, encoded))),
            )
        texts = {_key(text): text for of_item in encoded for text, _ in of_item}
        for text in texts.values():
            _require_known(self.name, text.tokens, subject.vocab_size)
        found = score_continuations(subject.network, list(texts.values()))
        scores = dict(zip(texts, found, strict=True))
        for item, of_item in zip(items, encoded, strict=True):
            sums = [float(scores[_key(text)].log_probs.double().sum()) for text, _ in of_item]
            yield self._of_choice(item, sums)

    def _of_choice(self, item: Item, log_probs: Sequence[float]) -> ItemResult:
        per_byte = [
            one / max(1, len(choice.encode()))
            for one, choice in zip(log_probs, item.choices, strict=True)
        ]
        taken = [
            item.choices[max(range(len(by)), key=by.__getitem__)] for by in (log_probs, per_byte)
        ]
        grades = [self._task.grade(item, choice) for choice in taken]
        values = {"accuracy": (grades[0], 1.0), "accuracy_per_byte": (grades[1], 1.0)}
        said = {"choice": taken[0], "log_probs": list(log_probs)}
        return ItemResult(item.name, values, item.group, item.document, said)

    def _written(self, subject: Subject, items: Sequence[Item]) -> Iterator[ItemResult]:
        """Let the model write the answers to items, all in one batch."""
        questions = [self._question(subject, one) for one in items]
        wanted = [(one, number) for one in questions for number in range(self._asking.samples)]
        answers = [Answer(*one, subject.reader.tokenizer) for one in wanted]
        if wanted:
            settings = Batching(vocab_size=subject.vocab_size, rows=self._asking.batch)
            requests = (
                one.question.request(one.number, functools.partial(answers.__getitem__, place))
                for place, one in enumerate(answers)
            )
            for new in stream(subject.network, requests, settings):
                heartbeat.enter(heartbeat.last().part)  # still there
                answers[new.request].add(new)
        for number, item in enumerate(items):
            first = number * self._asking.samples
            texts = [one.text for one in answers[first : first + self._asking.samples]]
            yield self._of_answers(item, texts)

    def _question(self, subject: Subject, item: Item) -> Question:
        tokens = subject.reader.prompt(item.prompt)
        _require_known(f"{self.name}, {item.name}", tokens, subject.vocab_size)
        asking = self._asking
        settings = AnswerSettings(
            max_new_tokens=item.max_tokens, stop=list(item.stop), temperature=asking.temperature
        )
        key = hashlib.sha256(repr((asking.seed, self.name, item.name)).encode()).digest()
        prompt = Prompt(
            name=item.name, where=item.name, content=item.prompt, settings=settings,
            seed=int.from_bytes(key[:_SEED_BYTES]),
        )  # fmt: skip
        return Question(
            prompt=prompt, text=item.prompt, tokens=tokens, budget=None, ends=subject.reader.ends
        )

    def _of_answers(self, item: Item, texts: Sequence[str]) -> ItemResult:
        grades = [self._task.grade(item, text) for text in texts]
        values = {"score": (sum(grades) / len(grades), 1.0)}
        if len(grades) > 1:
            right = [sum(grade == 1 for grade in grades)]
            for k in _counts(len(grades)):
                values[f"pass@{k}"] = (float(pass_at_k([len(grades)], right, k)[0]), 1.0)
        said = {"answers": list(texts), "grades": grades}
        return ItemResult(item.name, values, item.group, item.document, said)


def digest(data: Any) -> str:
    """Return the SHA-256 of plain data, in hexadecimal."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _counts(samples: int) -> list[int]:
    """Return 1, 2, 4 and so on below a number of samples, and the number itself."""
    return [2**power for power in range((samples - 1).bit_length())] + [samples]


def _key(text: Text) -> tuple[int, tuple[int, ...]]:
    return text.start, tuple(text.tokens)


def _require_known(where: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        UserError: on all processes.
    """
    if max(tokens) >= vocab_size:
        error = UserError(
            f"{where}: token {max(tokens)} of the prompt is beyond the vocabulary of the model, "
            f"which has {vocab_size}"
        )
        error.on_all_ranks = True
        raise error
