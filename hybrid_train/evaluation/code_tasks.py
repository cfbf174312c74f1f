"""Tasks from held-out code: which line comes next, which word stands in a line.

A prompt ends in a letter, and its choices begin with the white space behind it: so no tokenizer
that splits at white space first joins the end of the one to the beginning of the other.
"""

import keyword
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid_train.data.quickstart import read_sources, source_files, split, standard_library
from hybrid_train.evaluation.items import ExactTask, Item, mixed
from hybrid_train.schema.evaluation import CHOICES, CodeTask, FillIn, NextLine
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_SHORTEST = 12  # letters of a line that is asked for; shorter ones are often the same
_LIKE = 0.25  # by this share of the length of the right one, a wrong line may be longer or shorter
_LETTERS = 2  # by which a wrong word may be longer or shorter
_WORD = re.compile(r"(?<=\S) ([^\W\d]\w{2,})\b")  # with a space before it, not at the beginning


@dataclass(frozen=True)
class Code:
    """The lines of one file, without white space at their ends."""

    name: str
    lines: list[str]


def held_out(files: Sequence[str]) -> list[Code]:
    """Read code that a model was not trained on.

    Args:
        files: text files, or folders of Python files; none: the validation part of the standard
            library, as the quickstart corpus divides it.

    Raises:
        UserError: if one is missing or no text, or a folder has no Python files.
    """
    if files:
        found = [path for name in files for path in _files_of(Path(name))]
        names = [str(path) for path in found]
    else:
        root = standard_library()
        found = split(root, source_files(root))[1]
        names = [path.relative_to(root).as_posix() for path in found]
    return [_read(path, name) for path, name in zip(found, names, strict=True)]


class _CodeQuestions(ExactTask):
    """Goes through the lines of all files, until there are questions enough."""

    name: str

    def __init__(self, settings: CodeTask) -> None:
        self._settings = settings

    def items(self) -> list[Item]:
        settings = self._settings
        random = np.random.default_rng([settings.seed, *self.name.encode()])
        files = held_out(settings.files)
        found: list[Item] = []
        for code, at in _places(files, random):
            # A blank line before it would be the border of prompt and choice.
            if code.lines[at - 1]:
                found += self._question(code, at, random)
            if len(found) == settings.items:
                return found
        raise UserError(
            f"task.{self.name}.items = {settings.items}: {counted(len(files), 'file')} of held-out "
            f"code give {counted(len(found), 'question')}; ask for as many, or name more in "
            f"task.{self.name}.files"
        )

    def _question(self, code: Code, at: int, random: np.random.Generator) -> Iterator[Item]:
        """Yield the question about a line, if it is fit for one."""
        raise NotImplementedError


class NextLineTask(_CodeQuestions):
    """Which of four lines of a file comes next."""

    name = "next_line"

    def __init__(self, settings: NextLine) -> None:
        super().__init__(settings)
        self._context = settings.context_lines

    def _question(self, code: Code, at: int, random: np.random.Generator) -> Iterator[Item]:
        right = code.lines[at].lstrip()
        context = code.lines[max(0, at - self._context) : at]
        wrong = _drawn(right, self._others(code, right, context), random)
        if len(right) < _SHORTEST or not wrong:
            return
        indent = code.lines[at][: -len(right)]  # one of its own would give a wrong line away
        answer = f"\n{indent}{right}"
        yield Item(
            name=f"{code.name}:{at + 1}",
            prompt="\n".join(context).lstrip("\n"),
            answer=answer,
            choices=mixed(answer, [f"\n{indent}{one}" for one in wrong], random),
            document=code.name,
        )

    def _others(self, code: Code, right: str, context: Sequence[str]) -> list[str]:
        """Lines of the file, each once, that are not read in the prompt and are about as long."""
        read = {right, *(line.lstrip() for line in context)}
        slack = _LIKE * len(right)
        lines = dict.fromkeys(line.lstrip() for line in code.lines)
        return [one for one in lines if one not in read and abs(len(one) - len(right)) <= slack]


class FillInTask(_CodeQuestions):
    """Which of four words of a file stands in a line."""

    name = "fill_in"

    def __init__(self, settings: FillIn) -> None:
        super().__init__(settings)
        self._context = settings.context_lines

    def _question(self, code: Code, at: int, random: np.random.Generator) -> Iterator[Item]:
        line = code.lines[at]
        asked = [one for one in _WORD.finditer(line) if not keyword.iskeyword(one[1])]
        if not asked:
            return
        gap = asked[int(random.integers(len(asked)))]
        wrong = _drawn(gap[1], self._others(code, gap[1]), random)
        if not wrong:
            return
        before, rest = line[: gap.start()], line[gap.end() :]
        answer = f" {gap[1]}{rest}"
        yield Item(
            name=f"{code.name}:{at + 1}",
            prompt="\n".join([*code.lines[max(0, at - self._context) : at], before]).lstrip("\n"),
            answer=answer,
            choices=mixed(answer, [f" {one}{rest}" for one in wrong], random),
            document=code.name,
        )

    def _others(self, code: Code, right: str) -> list[str]:
        words = dict.fromkeys(word for line in code.lines for word in _WORD.findall(line))
        return [
            word
            for word in words
            if word != right
            and not keyword.iskeyword(word)
            and abs(len(word) - len(right)) <= _LETTERS
        ]


def _places(files: Sequence[Code], random: np.random.Generator) -> list[tuple[Code, int]]:
    """Return each line of each file but the first, once.

    They come in rounds of one line a file, both drawn, so that no long table takes all places.
    """
    drawn = [random.permutation(np.arange(1, len(code.lines))).tolist() for code in files]
    places = [(turn, file, at) for file, lines in enumerate(drawn) for turn, at in enumerate(lines)]
    mixed_up = [places[place] for place in random.permutation(len(places))]
    return [(files[file], at) for _, file, at in sorted(mixed_up, key=lambda place: place[0])]


def _drawn(right: str, others: Sequence[str], random: np.random.Generator) -> list[str]:
    """Draw wrong choices; none where the others do not suffice.

    How many of them are shorter is drawn first, so that the length of a choice tells nothing.
    """
    wanted = CHOICES - 1
    shorter = [one for one in others if len(one) < len(right)]
    longer = [one for one in others if len(one) > len(right)]
    if min(len(shorter), len(longer)) < wanted:  # of either side, whatever was drawn
        return []
    part = int(random.integers(wanted + 1))
    return [
        side[number]
        for side, count in ((shorter, part), (longer, wanted - part))
        for number in random.choice(len(side), count, replace=False)
    ]


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = source_files(path)
    if not found:
        raise UserError(f"{path} has no Python files; name text files, or another folder")
    return found


def _read(path: Path, name: str) -> Code:
    try:
        text = "".join(read_sources([path]))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no text in UTF-8, or not in the encoding it names") from error
    return Code(name, [line.rstrip() for line in text.split("\n")])
