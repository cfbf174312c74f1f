"""Answers: what is asked of the engine for each, what has come of it, and the file of all."""

import dataclasses
import enum
import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from hybrid_train.data.any_tokenizer import FolderTokenizer
from hybrid_train.generation.prompts import GENERATED, Prompt, seed_of
from hybrid_train.generation.requests import Finish, NewTokens, Request, Watcher
from hybrid_train.generation.sampling import Sampling
from hybrid_train.generation.text import AnswerText
from hybrid_train.generation.thinking import Budget, ThinkingWatcher, blanks_of
from hybrid_train.schema.problems import UserError

_KEY_LETTERS = 16  # of a SHA-256 in hexadecimal
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as the model reads it.

    Attributes:
        prompt: what was given.
        text: what is encoded; None: token ids were given.
        tokens: of it.
        budget: of thinking; None: there is none.
        ends: tokens that end an answer.
    """

    prompt: Prompt
    text: str | None
    tokens: Sequence[int]
    budget: Budget | None
    ends: frozenset[int]

    def request(self, answer: int, watch: Callable[[], Watcher]) -> Request:
        """Return what the engine is asked for: an answer by its number, and who watches it."""
        one = self.prompt.settings
        sampling = Sampling(
            repetition_penalty=one.repetition_penalty, temperature=one.temperature,
            top_k=one.top_k, top_p=one.top_p, min_p=one.min_p, seed=seed_of(self.prompt, answer),
        )  # fmt: skip
        return Request(
            prompt=self.tokens, sampling=sampling, max_new_tokens=one.max_new_tokens,
            ends=self.ends, watch=watch,
        )  # fmt: skip

    def key(self, answer: int, checkpoint: str, *, log_probs: bool) -> str:
        """Return a digest of all that decides an answer: whether a file has this very one."""
        settings = dataclasses.asdict(self.prompt.settings)
        del settings["seed"], settings["n"]  # in their place stands the seed of the answer
        decides = [checkpoint, log_probs, list(self.tokens), sorted(self.ends), settings]
        text = json.dumps([*decides, seed_of(self.prompt, answer)], default=_plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LETTERS]


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, enum.Enum) else str(value)


class Answer:
    """One answer to a question while it grows; it watches its own tokens."""

    def __init__(self, question: Question, number: int, tokenizer: FolderTokenizer) -> None:
        """Begin an answer.

        Args:
            question: what is answered.
            number: of the answer among those to the question, from 0.
            tokenizer: makes text of tokens.
        """
        settings = question.prompt.settings
        self.question, self.number = question, number
        self.tokens: list[int] = []
        self._num_taken = 0
        self.log_probs: list[float] = []
        self.finish: Finish | None = None
        self._text = AnswerText(
            tokenizer, question.tokens, settings.stop, include_stop=settings.include_stop
        )
        self._thinking = None
        if question.budget is not None:
            blanks = blanks_of(tokenizer, question.tokens, question.budget.opened)
            self._thinking = ThinkingWatcher(tokenizer, question.budget, blanks)

    def forced(self) -> int | None:
        """Return the token that must come next; None: any."""
        return self._thinking.forced() if self._thinking else None

    def take(self, token: int) -> bool:
        """Take the next token; return whether a stop string ends the answer with it."""
        self._num_taken += 1
        if self._thinking:
            self._thinking.take(token)
        return self._text.take(token)

    def add(self, new: NewTokens) -> str:
        """Note what a step has added; return the text that it brought for good."""
        self.tokens += new.tokens
        self.log_probs += new.log_probs
        self.finish = new.finish
        # The end token no watcher sees, nor what another data-parallel rank has chosen.
        for token in self.tokens[self._num_taken :]:
            self.take(token)
        if new.finish is not None:
            self._text.close()
        return self._text.fresh()

    @property
    def text(self) -> str:
        """All of the text that will stay."""
        return self._text.text

    def record(self, key: str, *, log_probs: bool) -> dict[str, Any]:
        """Return the line of an answer that is over."""
        assert self.finish is not None
        prompt = self.question.prompt
        made = {
            "answer": self.number,
            "text": self.text,
            "tokens": self.tokens,
            **({"log_probs": [_finite(one) for one in self.log_probs]} if log_probs else {}),
            "finish": self.finish.value,
            "prompt_tokens": len(self.question.tokens),
            "new_tokens": len(self.tokens),
            "seed": seed_of(prompt, self.number),
            "key": key,
        }
        return {**_given(prompt), GENERATED: made}


def _finite(number: float) -> float | None:
    """Return a number that JSON has; a forced token may have a probability of 0."""
    return number if math.isfinite(number) else None


class AnswerFile:
    """A file with a line of JSON for each answer, written whole as soon as the answer is over.

    A batch that was killed leaves whole lines, but perhaps for the last one, which is taken away
    when the same batch is started again; then it goes on with the answers that are missing. The
    file is locked while it is open: two batches would write each answer twice.
    """

    def __init__(self, path: Path, checkpoint: str, log_probs: bool = False) -> None:
        """Open a file, or make it, and read the answers in it.

        Args:
            path: of the file.
            checkpoint: name of the run and of its checkpoint.
            log_probs: whether lines have those of the new tokens.

        Raises:
            UserError: if it cannot be written, another job writes it, or it has anything else.
        """
        self.path, self.checkpoint, self.log_probs = path, checkpoint, log_probs
        self._there: dict[tuple[str | int, int], tuple[str, int]] = {}  # key and line of each
        self._tail = b""  # a line without its end
        self._file = _opened(path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file and of its lock."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._tail = line
                break
            name, answer, key = self._made(line, number)
            if (name, answer) in self._there:
                raise UserError(
                    f"output = {self.path}: line {number} is answer {answer} to id "
                    f"{json.dumps(name)}, as is line {self._there[name, answer][1]}; choose "
                    "another output, or remove one of the lines"
                )
            self._there[name, answer] = (key, number)

    def _made(self, line: bytes, number: int) -> tuple[str | int, int, str]:
        """Return id, number and key of the answer in a line."""
        try:
            read = json.loads(line)
            name, made = read["id"], read[GENERATED]
            answer, key = made["answer"], made["key"]
            if type(name) not in (str, int) or type(answer) is not int or type(key) is not str:
                raise TypeError("id, answer or key is of another type")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"output = {self.path}: line {number} is no answer that was generated; choose "
                "another output"
            ) from error
        return name, answer, key

    def missing(self, questions: Sequence[Question]) -> Iterator[tuple[Question, int]]:
        """Yield what is not answered yet: questions, with the numbers of answers.

        Raises:
            UserError: at once, if the file has answers to anything else.
        """
        asked = [(one, number) for one in questions for number in range(one.prompt.settings.n)]
        keys = {
            (one.prompt.name, number): one.key(number, self.checkpoint, log_probs=self.log_probs)
            for one, number in asked
        }
        for (name, number), (key, line) in self._there.items():
            if keys.get((name, number)) != key:
                raise UserError(
                    f"output = {self.path}: line {line} answers another prompt than id "
                    f"{json.dumps(name)} of now, or with other settings or another checkpoint; "
                    "choose another output, or remove the file"
                )
        self._cut_tail(questions)
        if self._there:
            _log.info("%s has %d of %d answers already", self.path, len(self._there), len(asked))
        return ((one, n) for one, n in asked if (one.prompt.name, n) not in self._there)

    def _cut_tail(self, questions: Sequence[Question]) -> None:
        """Take a part of a line away, if it is one of an answer to these questions.

        Raises:
            UserError: if it may be anything else, which is not lost.
        """
        tail = self._tail
        if not tail:
            return
        begins = (_json(_given(one.prompt))[:-1] + f', "{GENERATED}": {{' for one in questions)
        if not any(one.startswith(tail) or tail.startswith(one) for one in map(str.encode, begins)):
            raise UserError(
                f"output = {self.path}: ends with a part of a line with which no answer to these "
                "prompts begins; choose another output"
            )
        _log.info("%s ends with a part of a line; that answer is written again", self.path)
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        self._tail = b""

    def write(self, answer: Answer) -> None:
        """Append the line of an answer that is over."""
        question, number = answer.question, answer.number
        key = question.key(number, self.checkpoint, log_probs=self.log_probs)
        line = _json(answer.record(key, log_probs=self.log_probs))
        self._file.write(line.encode() + b"\n")
        self._file.flush()


def _given(prompt: Prompt) -> dict[str, Any]:
    """Return what a line repeats of its prompt."""
    return {"id": prompt.name, **prompt.fields}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _opened(path: Path) -> BinaryIO:
    """Open a file to read and append, and lock it until it is closed.

    Raises:
        UserError: if it is none, cannot be written, or another job has it.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "device or a pipe"
            raise UserError(f"output = {path}: is a {kind}; it must be a file, or a new one")
        file = path.open("a+b")
    except OSError as error:
        raise UserError(
            f"output = {path}: cannot be written: {error.strerror}; choose another output"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"output = {path}: another job writes into it now; wait for its end, or choose "
            "another output"
        ) from error
    except OSError as error:  # some network file systems have no locks
        _log.warning(
            "%s cannot be locked (%s): let no other job write into it", path, error.strerror
        )
    return file


def all_of(questions: Iterable[Question]) -> Iterator[tuple[Question, int]]:
    """Yield every question with the number of each of its answers."""
    return ((one, number) for one in questions for number in range(one.prompt.settings.n))
