"""What a folder of stored targets holds, and how large it is; known without torch.

    FOLDER/format.json  targets.json  head.safetensors  train-0/00000000.safetensors  ...

A file holds some rows of a phase, or of a validation, in their order. `targets.json` is written
when all is there.

Dimensions: R rows of a file, L tokens of a row, H hidden units of the teacher, K tokens that are
told apart, V tokens of the vocabulary.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.schema.data import Split
from hybrid_train.schema.formats import STORED_TARGETS, require_readable_folder
from hybrid_train.schema.problems import UserError

HEADER, UNFINISHED = "targets.json", "unfinished.json"  # whole or not yet
HEAD = "head.safetensors"
DIGESTS, SUMS = "digests", "sums"  # of each row of a file: of what was read, of what was written
HIDDEN, TOKENS, LOGITS, LOG_SUM = "hidden", "tokens", "logits", "log_sum"
_ROW_BYTES = 16  # a digest and a sum
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, bytes
_FILE_BYTES = 256 * 2**20  # at most, unless a row has more
_FILES, _LEAST_ROWS = 64, 16  # of a part, about: a short one is shared by ranks, and resumed, too


def mtp_hidden(depth: int) -> str:
    """Return the name of the hidden states of an MTP depth, from 0."""
    return f"mtp_hidden.{depth}"


@dataclass(frozen=True)
class Part:
    """The rows of a phase, or of a validation.

    Attributes:
        name: of its folder.
        split: train or validation.
        length: tokens of a row.
        start: tokens of the run before its first row; 0 in a validation.
        rows: how many there are.
        rows_per_file: of each file but the last.
    """

    name: str
    split: str
    length: int
    start: int
    rows: int
    rows_per_file: int

    @property
    def is_validation(self) -> bool:
        """Whether its rows are those of a validation."""
        return self.split == Split.validation.value

    @property
    def end(self) -> int:
        """Tokens of the run after its last row."""
        return self.start + self.rows * self.length

    @property
    def files(self) -> int:
        """How many files hold its rows."""
        return -(-self.rows // self.rows_per_file)

    def rows_of(self, file: int) -> range:
        """Return the numbers of the rows of a file."""
        first = file * self.rows_per_file
        return range(first, min(first + self.rows_per_file, self.rows))

    def path(self, folder: Path, file: int) -> Path:
        """Return the path of a file."""
        return folder / self.name / f"{file:08d}.safetensors"


@dataclass(frozen=True)
class Header:
    """What a folder holds and what it was made of.

    Attributes:
        what: hidden (states) or top_k.
        top_k: tokens that are told apart; None with hidden states.
        dtype: of hidden states, or of logits, by its name in torch.
        vocab_size: tokens of the teacher, without padding.
        mtp_depths: whose hidden states are there, too.
        tokenizer: its fingerprint.
        data: the record of the data, see `data/record.py`.
        seed: of the run, which decides the order of rows.
        teacher: a `ChosenTeacher`.
        parts: the rows.
    """

    what: str
    top_k: int | None
    dtype: str
    vocab_size: int
    mtp_depths: int
    tokenizer: str
    data: Mapping[str, Any]
    seed: int
    teacher: Mapping[str, Any]
    parts: Sequence[Part]

    def width(self, hidden_size: int) -> int:
        """Return the bytes that are stored of a token; see `bytes_per_token`."""
        return bytes_per_token(
            hidden_size, self.dtype, mtp_depths=self.mtp_depths, top_k=self.top_k
        )

    @property
    def names(self) -> list[str]:
        """The tensors that a file has of each row."""
        if self.what == HIDDEN:
            return [HIDDEN, *(mtp_hidden(depth) for depth in range(self.mtp_depths))]
        return [TOKENS, LOGITS, LOG_SUM]

    def as_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def of(said: Mapping[str, Any], folder: Path) -> "Header":
        """Return what was read from JSON.

        Raises:
            UserError: if something is missing in it.
        """
        try:
            return Header(**{**said, "parts": [Part(**one) for one in said["parts"]]})
        except (TypeError, KeyError) as error:
            raise UserError(
                f"what {folder} says of itself is damaged ({error!r}); {STORED_TARGETS.too_old}"
            ) from error

    def differences(self, other: "Header") -> list[str]:
        """Name what differs; the place of the teacher may."""
        mine, theirs = (json.loads(one.as_text()) for one in (self, other))
        for one in (mine, theirs):
            for place in ("source", "run_dir"):
                one["teacher"].pop(place, None)
        return [one.name for one in fields(Header) if mine[one.name] != theirs[one.name]]


def parts_of(
    phases: Sequence[PhaseSpan], held_out: Callable[[PhaseSpan], int], width: int
) -> Iterator[tuple[Part, PhaseSpan]]:
    """Yield the rows of each phase and of each kind of validation, with the phase they are of.

    Args:
        phases: of the run.
        held_out: rows of the validation of a phase.
        width: bytes that are stored of a token.
    """
    seen = set()
    for phase in phases:
        length, rows = phase.job.train.sequence_length, phase.length.sequences
        size = max(1, min(_FILE_BYTES // (width * length), max(_LEAST_ROWS, rows // _FILES)))
        yield (
            Part(f"train-{phase.number}", Split.train.value, length, phase.start, rows, size),
            phase,
        )
        validated = held_out(phase)
        if validated and (length, validated) not in seen:
            seen.add((length, validated))
            name, split = f"validation-{phase.number}", Split.validation.value
            yield Part(name, split, length, 0, validated, size), phase


def bytes_per_token(
    hidden_size: int, dtype: str, *, mtp_depths: int = 0, top_k: int | None = None
) -> int:
    """Return what a token of a row takes on disk.

    Args:
        hidden_size: H of the teacher.
        dtype: of hidden states, or of logits.
        mtp_depths: whose hidden states are stored, too.
        top_k: K; None: hidden states are stored.
    """
    if top_k is None:
        return (1 + mtp_depths) * hidden_size * _SIZES[dtype]
    return top_k * (4 + _SIZES[dtype]) + 4


def bytes_of_rows(rows: int, length: int, width: int) -> int:
    """Return what rows take, without the table of names that a file begins with.

    Args:
        rows: how many.
        length: tokens of each.
        width: bytes that are stored of a token.
    """
    return rows * (length * width + _ROW_BYTES)


def bytes_of_head(vocab_size: int, hidden_size: int, dtype: str) -> int:
    """Return what the head of a teacher takes, which lies beside hidden states."""
    return vocab_size * hidden_size * _SIZES[dtype]


def read_header(folder: Path) -> Header:
    """Read what stored targets say of themselves.

    Raises:
        UserError: if there are none, they were never finished, or of a format that is not read.
    """
    path, words = (
        folder / HEADER,
        "holds no stored targets: hybrid-train distill_targets writes some",
    )
    if (folder / UNFINISHED).is_file():
        words = "was never finished: the same hybrid-train distill_targets goes on"
    if not path.is_file():
        raise UserError(f"objective.targets={folder} {words}")
    require_readable_folder(folder, STORED_TARGETS)
    try:
        said = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {STORED_TARGETS.too_old}") from error
    return Header.of(said, folder)
