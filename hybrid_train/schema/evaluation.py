"""Settings of evaluation: of each task, of lm-eval, and which tasks a model is asked.

Each field of `Tasks` is a task; `hybrid_train/evaluation/tasks.py` has the class behind it, or that
of held-out text and decoding, which ask no questions, in a file of its name. Names
of settings say their unit: words are what stands between white space, whatever the tokenizer.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated

from hybrid_train.schema.limits import (
    COLDEST,
    Count,
    CountOrNone,
    Factor,
    FileName,
    Length,
    Name,
    Range,
    Seed,
    Share,
    TokenCount,
)
from hybrid_train.schema.names import listed, nearest
from hybrid_train.schema.problems import Problem

CHOICES = 4  # of a question with choices: one is right

Questions = Annotated[int, Range(1, 10**6)]
Lines = Annotated[int, Range(1, 10**4)]
Shots = Annotated[int, Range(0, 1000)]
DrawnItems = Annotated[int, Range(1, 2**16)]  # words to copy, pairs of brackets
Pairs = Annotated[int, Range(CHOICES, 2**16)]  # of key and value: all choices stand in the prompt
Symbols = Annotated[int, Range(CHOICES, 2**20)]  # so many that there are others to choose from
BracketTypes = Annotated[int, Range(2, 64)]  # all of them are choices
Words = Annotated[int, Range(64, 2**22)]
Digits = Annotated[int, Range(1, 100)]
Drafts = Annotated[int, Range(0, 64)]  # tokens that an MTP block drafts ahead


@dataclass(kw_only=True)
class TaskSettings:
    """What the settings of every task have."""

    items: Questions = 200  # questions, of all groups together
    seed: Seed = 0

    def problems(self) -> Iterator[Problem]:
        """Check that each list of groups has some, and none twice."""
        for one in fields(self):
            groups = getattr(self, one.name)
            if not isinstance(groups, list) or one.name == "files":
                continue
            if not groups or len({str(group) for group in groups}) < len(groups):
                rule = "must name one group or more, none of them twice"
                yield Problem(one.name, groups, rule, list(dict.fromkeys(groups)) or None)


@dataclass(kw_only=True)
class CodeTask(TaskSettings):
    """Questions from code that was held out.

    `files` are text files, or folders of Python files. None: the validation part of the standard
    library, which the quickstart corpus does not train on.
    """

    files: list[FileName] = field(default_factory=list)


@dataclass(kw_only=True)
class NextLine(CodeTask):
    """Which of four lines of a file comes next; the others have its indent and about its length."""

    context_lines: Lines = 16  # at most, before the line


@dataclass(kw_only=True)
class FillIn(CodeTask):
    """Which of four words of a file stands in a line; the rest of the line is scored with it."""

    context_lines: Lines = 16  # at most, before the line


@dataclass(kw_only=True)
class Copying(TaskSettings):
    """Repeat a list of random words; documents of the synthetic stream `copy`."""

    words: list[DrawnItems] = field(default_factory=lambda: [4, 8, 16, 32])
    symbols: Symbols = 32  # different words


@dataclass(kw_only=True)
class Recall(TaskSettings):
    """Which value a key has, among pairs of them; documents of the synthetic stream `recall`."""

    pairs: list[Pairs] = field(default_factory=lambda: [4, 8, 16, 32])
    keys: Symbols = 64
    values: Symbols = 64

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        for place, pairs in enumerate(self.pairs):
            if pairs > self.keys:
                rule = "must be at most keys: the keys of a document differ"
                yield Problem(f"pairs.{place}", pairs, rule, self.keys)


@dataclass(kw_only=True)
class Brackets(TaskSettings):
    """Which bracket closes the one that is open; documents of the synthetic stream `brackets`."""

    pairs: list[DrawnItems] = field(default_factory=lambda: [4, 8, 16, 32])
    types: BracketTypes = 4


@dataclass(kw_only=True)
class Sums(TaskSettings):
    """Which number a sum gives, modulo another; documents of the synthetic stream `sums`."""

    shots: list[Shots] = field(default_factory=lambda: [3, 15])  # whole sums before the one asked
    modulus: Symbols = 23
    terms: DrawnItems = 2  # numbers that one sum adds


class Filler(enum.Enum):
    """What a needle hides in."""

    code = "code"  # lines of held-out code
    prose = "prose"  # sentences of a fixed list


@dataclass(kw_only=True)
class Needle(CodeTask):
    """Which value a key has that was told once, in filler, by length and depth.

    Three other keys stand elsewhere; their values are the wrong choices.
    """

    words: list[Words] = field(default_factory=lambda: [128, 512, 2048])  # of a whole prompt
    depths: list[Share] = field(default_factory=lambda: [0.0, 0.5, 1.0])  # 0: at its beginning
    filler: Filler = Filler.code


class Operation(enum.Enum):
    """What is computed of two numbers."""

    sum = "sum"
    product = "product"
    modulus = "modulus"


@dataclass(kw_only=True)
class Arithmetic(TaskSettings):
    """Sums, products and remainders of two whole numbers; the model writes the result."""

    operations: list[Operation] = field(default_factory=lambda: list(Operation))
    digits: list[Digits] = field(default_factory=lambda: [1, 2, 3])  # of each of the two numbers
    shots: Shots = 4  # solved ones of the same kind before it


@dataclass(kw_only=True)
class ReasoningGym(TaskSettings):
    """A task of the library reasoning-gym, which also grades; extra `reasoning_gym`."""

    name: Name = "chain_sum"
    # Its attributes, each as Python writes it: {min_terms: 2, operators: "['+']"}.
    difficulty: dict[str, str] = field(default_factory=dict)
    max_tokens: Annotated[int, Range(1, 2**20)] = 64  # of a written answer


@dataclass(kw_only=True)
class HeldOut:
    """Loss, bits per byte and accuracy of the next token on held-out documents, by source."""

    files: list[FileName] = field(default_factory=list)  # prefixes; empty: validation of the run
    tokens: TokenCount = "200k"  # of each source, in documents that the seed draws
    length: Length | None = None  # tokens that are read at once; null: as the run was trained
    # Split results by how many tokens of its document a token has before it, in one window: the
    # first of each range of positions but the one from 0, [256,1024]; empty: not split.
    positions: list[Length] = field(default_factory=list)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if sorted(set(self.positions)) != self.positions:
            rule = "must rise: each is where a range begins"
            yield Problem("positions", self.positions, rule, sorted(set(self.positions)))
        if self.length is not None and self.positions and self.positions[-1] >= self.length:
            rule = f"must lie below length ({self.length}): no token has so many before it"
            yield Problem("positions", self.positions, rule)


@dataclass(kw_only=True)
class Decoding:
    """Speed and cache of generation by length of the prompt, and how many drafts are right.

    One text at a time goes on behind held-out text, by the most likely token each time.
    """

    lengths: list[Length] = field(default_factory=lambda: [256, 1024])  # tokens of a prompt
    drafts: list[Drafts] = field(default_factory=lambda: [0])  # tokens that an MTP block drafts
    new_tokens: Annotated[int, Range(2, 2**20)] = 64  # behind each prompt
    prompts: Annotated[int, Range(1, 10**4)] = 4  # of each length

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        for name in ("lengths", "drafts"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                rule = "must name one or more, none of them twice"
                yield Problem(name, given, rule, list(dict.fromkeys(given)) or None)


@dataclass(kw_only=True)
class Tasks:
    """Settings of every task, under its name."""

    heldout: HeldOut = field(default_factory=HeldOut)
    decoding: Decoding = field(default_factory=Decoding)
    next_line: NextLine = field(default_factory=NextLine)
    fill_in: FillIn = field(default_factory=FillIn)
    copying: Copying = field(default_factory=Copying)
    recall: Recall = field(default_factory=Recall)
    brackets: Brackets = field(default_factory=Brackets)
    sums: Sums = field(default_factory=Sums)
    needle: Needle = field(default_factory=Needle)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    reasoning_gym: ReasoningGym = field(default_factory=ReasoningGym)


@dataclass(kw_only=True)
class Harness:
    """Tasks of lm-eval: one's own YAML files, and its stock ones where their data is cached."""

    tasks: list[Name] = field(default_factory=list)  # names of tasks, groups or tags
    include: FileName | None = None  # folder with YAML files of tasks; these count before stock
    num_fewshot: CountOrNone | None = None  # worked examples in a prompt; None: as the task says
    limit: Count | None = None  # documents of each task; None: all
    apply_chat_template: bool = False  # write prompts as conversations, by the model's template
    template: Name | None = None  # the chat template of this name; None: default
    fewshot_as_multiturn: bool = True  # in a conversation each worked example is a turn
    system: str | None = None  # what a conversation, or a prompt, begins with
    bos: bool | None = None  # texts begin as the tokenizer does; None: if the model was imported
    max_length: Length | None = None  # tokens that the model reads at once; None: as trained
    seed: Seed = 1234  # chooses worked examples, and what tasks draw
    batch: Annotated[int, Range(1, 4096)] = 8  # answers that grow together
    batch_tokens: Length = 2048  # that are read at once where log-probabilities are asked for

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.apply_chat_template:
            return
        if self.template is not None:
            rule = "needs apply_chat_template=true; no template is read without"
            yield Problem("template", self.template, rule, "null")


@dataclass(kw_only=True)
class Asking:
    """Which tasks a model is asked, and how."""

    tasks: list[str] = field(default_factory=list)  # names, as in `task`
    task: Tasks = field(default_factory=Tasks)
    limit: Count | None = None  # items of each task at most
    samples: Annotated[int, Range(1, 2**16)] = 1  # answers to each item; several give pass@k
    temperature: Factor = 0.0  # of answers that are drawn; 0: the most likely token each time
    seed: Seed = 1234  # of items, answers and intervals
    batch: Annotated[int, Range(1, 4096)] = 8  # answers that grow together

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from _task_problems(self.task_names)
        if 0 < self.temperature < COLDEST:
            rule = f"must be 0, the most likely token, or at least {COLDEST}"
            yield Problem("temperature", self.temperature, rule, 0)
        if self.samples > 1 and self.temperature == 0:
            rule = "must be 1 at temperature 0, where all answers of an item are equal"
            yield Problem("samples", self.samples, rule, 1)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return listed(self.tasks)


@dataclass(kw_only=True)
class Evaluation(Asking):
    """Tasks that a model is asked while it trains; it trains on to the bit as if it were not."""

    interval: CountOrNone = 0  # steps; 0: never

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        if self.interval and not self.task_names:
            rule = f"must name a task where there is an interval: {', '.join(_known())}"
            yield Problem("tasks", "[]", rule)


def _known() -> list[str]:
    return [one.name for one in fields(Tasks)]


def _task_problems(names: list[str]) -> Iterator[Problem]:
    """Yield names that no task has, and those that are there twice."""
    for number, name in enumerate(names):
        if name not in _known():
            rule = f"is no task; there are {', '.join(_known())}"
            yield Problem("tasks", name, rule, nearest(name, _known()))
        elif name in names[:number]:
            yield Problem("tasks", name, "is there twice")
