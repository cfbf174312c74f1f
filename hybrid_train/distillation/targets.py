"""Stored targets: what a teacher says of the rows of a run, written once, read under any layout.

    FOLDER/format.json  targets.json  head.safetensors  train-0/00000000.safetensors  ...

A file holds some rows of a phase, or of a validation, in their order. A row of training is found by
its position in tokens, so batches, ramps and layouts do not matter; a row of a validation by what
is in it, since phases cut validations otherwise. Each row has a digest of its tokens: a row that is
not the one that was read by the teacher is refused. `targets.json` is written when all is there.

Dimensions: R rows of a file, B rows of a microbatch, L tokens of a row, S those of a context rank,
T = S x B, H hidden units of the teacher, K tokens that are told apart.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist

from hybrid_train.data.batch import Batch, Row
from hybrid_train.data.record import changes
from hybrid_train.distillation.teacher_record import read_header
from hybrid_train.ops.logits import HeadPart
from hybrid_train.ops.reference import Reference, Target, TopTokens
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.schema.data import Split
from hybrid_train.schema.formats import STORED_TARGETS
from hybrid_train.schema.objective import Distill, MtpTarget, ObjectiveSettings
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

HEAD = "head.safetensors"
DIGESTS, SUMS = "digests", "sums"  # of each row of a file: of what was read, of what was written
HIDDEN, TOKENS, LOGITS, LOG_SUM = "hidden", "tokens", "logits", "log_sum"
EXTRA = "target_"  # what the names of a file begin with as extra fields of a batch
_OPEN_FILES = 8  # of one process; a step reads from one or two


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

    @property
    def torch_dtype(self) -> torch.dtype:
        """The format of hidden states or logits."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

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


def digest_of(row: Row) -> int:
    """Return what tells rows apart by what a teacher reads of them, 64 bits with a sign."""
    found = hashlib.blake2b(digest_size=8)
    for values in (row.tokens, row.sequence_index):
        if values is not None:
            found.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return int.from_bytes(found.digest(), "little", signed=True)


def sum_of(tensors: Iterable[Tensor]) -> int:
    """Return the CRC-32 of the values of a row."""
    found = 0
    for one in tensors:
        found = zlib.crc32(one.contiguous().view(torch.uint8).numpy(), found)
    return found


def open_targets(folder: str | Path) -> "Targets":
    """Open what `distill_targets` wrote.

    Raises:
        UserError: if there is nothing, it was never finished, or of a format that is not read.
    """
    path = Path(folder)
    return Targets(path, Header.of(read_header(path), path))


def targets_of(objective: ObjectiveSettings) -> list["Targets"]:
    """Return the stored targets of an objective, a row transform; empty where it reads none."""
    if not isinstance(objective, Distill) or objective.targets is None:
        return []
    return [open_targets(objective.targets)]


@dataclass(frozen=True)
class Targets:
    """The stored targets of a run, a row transform."""

    folder: Path
    header: Header

    def __call__(self, row: Row) -> Row:
        """Return a row with its targets as extra fields, each [L, ...].

        Raises:
            UserError: if there are none, or they are of another row, or damaged.
        """
        part, number = self._place(row)
        file, within = divmod(number, part.rows_per_file)
        path, name = part.path(self.folder, file), _name_of(row)
        try:
            shard = _opened(path)
            if int(shard.get_slice(DIGESTS)[within]) != digest_of(row):
                raise _refused(
                    f"{name} is not the row that the teacher of {self.folder} read there: data, "
                    "seed or row transforms are others than those of hybrid-train distill_targets"
                )
            found = {one: shard.get_slice(one)[within] for one in self.header.names}
            damaged = sum_of(found.values()) != int(shard.get_slice(SUMS)[within])
        except (OSError, SafetensorError) as error:
            raise _refused(f"{path} cannot be read: {error}") from error
        if damaged:
            raise _refused(f"{path} is damaged: {name} has other bytes than were written")
        extras = {f"{EXTRA}{key}": _as_array(value) for key, value in found.items()}
        return replace(row, token_extras={**row.token_extras, **extras})

    def require_fits(self, phase_spans: Sequence[PhaseSpan], record: Mapping[str, Any]) -> None:
        """Refuse a run that reads other rows than the teacher did, before anything is written.

        Args:
            phase_spans: of the run.
            record: of its data, see `data/record.py`.

        Raises:
            UserError: with all that is other.
        """
        header = self.header
        lines = [*changes(header.data, record), *self._other_kind(phase_spans[0].job)]
        seed = phase_spans[0].job.train.seed
        if seed != header.seed:
            lines.append(f"train.seed={seed}; the targets have the order of {header.seed}")
        train = [one for one in header.parts if one.split == Split.train.value]
        for phase_span in phase_spans:
            length = phase_span.job.train.sequence_length
            if not any(
                one.start == phase_span.start and one.length == length and one.end >= phase_span.end
                for one in train
            ):
                lines.append(
                    f"tokens {phase_span.start:,} to {phase_span.end:,} in rows of {length:,} are "
                    "not among the targets, which have "
                    + ", ".join(f"{one.start:,} to {one.end:,} in {one.length:,}" for one in train)
                )
        if lines:
            text = "\n".join(f"  {line}" for line in lines)
            raise _refused(
                f"objective.targets={self.folder} was written for another run:\n{text}\n"
                "Train as it was written, or write targets for this run: "
                "hybrid-train distill_targets"
            )

    def _other_kind(self, job: TrainJob) -> Iterator[str]:
        """Yield what the objective asks for that is not stored."""
        settings, header = job.objective, self.header
        assert isinstance(settings, Distill), "it reads targets"
        if job.model.vocab_size != header.vocab_size:
            yield (
                f"model.vocab_size={job.model.vocab_size}; the teacher has {header.vocab_size} "
                "tokens"
            )
        wanted = parse(job.model.pattern).mtp_depths
        if settings.mtp is MtpTarget.divergence and wanted > header.mtp_depths:
            yield (
                f"objective.mtp=divergence: the model has {counted(wanted, 'MTP depth')}, the "
                f"targets {header.mtp_depths}; cross_entropy and off need none"
            )
        if header.what == HIDDEN:
            return
        if settings.temperature != 1:
            yield (
                f"objective.temperature={settings.temperature:g}: the most likely tokens alone "
                "give no other temperature than 1; what=hidden stores what gives any"
            )
        if settings.top_k not in (None, header.top_k):
            yield f"objective.top_k={settings.top_k}; the targets have {header.top_k}"

    def _place(self, row: Row) -> tuple[Part, int]:
        """Return the part of a row, and its number there."""
        length = len(row.tokens)
        if row.identity.split is Split.validation:
            found = self._held_out.get((length, digest_of(row)))
            if found is None:
                raise _refused(
                    f"{_name_of(row)} has no target in {self.folder}: its teacher did not read it"
                )
            return found
        for part in self.header.parts:
            ahead = row.identity.position - part.start
            is_there = 0 <= ahead < part.rows * part.length and ahead % part.length == 0
            if part.split == Split.train.value and part.length == length and is_there:
                return part, ahead // length
        raise _refused(
            f"{_name_of(row)} has no target in {self.folder}: no row of {length} tokens begins "
            f"there, after {row.identity.position:,} tokens of the run"
        )

    @cached_property
    def _held_out(self) -> dict[tuple[int, int], tuple[Part, int]]:
        """Places of the rows of validations, by their length and digest."""
        found = {}
        for part in self.header.parts:
            if part.split == Split.validation.value:
                for file in range(part.files):
                    digests = _opened(part.path(self.folder, file)).get_tensor(DIGESTS).tolist()
                    for number, digest in zip(part.rows_of(file), digests, strict=True):
                        found[part.length, digest] = part, number
        return found

    def head_part(self, group: dist.ProcessGroup | None, rows: int) -> HeadPart:
        """Return this rank's rows of the teacher's head, as the head of a student is split.

        Args:
            group: the tensor-parallel group of the student; None or of one process: no split.
            rows: of the student's head on each rank, padding included.

        Raises:
            UserError: if hidden states are not what is stored, or the file is damaged.
        """
        split = group is not None and group.size() > 1
        first = rows * dist.get_rank(group) if split else 0
        try:
            whole = _opened(self.folder / HEAD).get_slice(HEAD)
            own = whole[first : first + rows]
        except (OSError, SafetensorError) as error:
            raise _refused(f"{self.folder / HEAD} cannot be read: {error}") from error
        weight = own.new_zeros(rows, own.shape[1])
        weight[: len(own)] = own
        return HeadPart(weight, self.header.vocab_size, group if split else None)


@dataclass
class StoredTeacher:
    """What stands for a teacher that has said all; see `teachers.Teacher`."""

    targets: Targets
    weight: float = 1.0
    _head: HeadPart | None = field(default=None, init=False)

    def run_ahead(self, batches: Sequence[Batch], *, with_mtp: bool) -> list[Batch]:
        """Return the microbatches, which have their targets already.

        Raises:
            UserError: if those of MTP depths are wanted, and are not there; on all processes.
        """
        if with_mtp and not self.targets.header.mtp_depths:
            error = UserError(
                f"objective.targets={self.targets.folder} has none of the MTP depths: "
                "objective.mtp=cross_entropy or off, or write the hidden states of a teacher that "
                "has such depths, with objective.mtp=divergence"
            )
            error.on_all_ranks = True
            raise error
        return list(batches)

    def reference(self, batch: Batch, student: HeadPart, depth: int | None = None) -> Target:
        """Return what it has said of a microbatch; arguments as of a teacher that is there."""

        def taken(name: str) -> Tensor:
            """Bring values [B, S, ...] into the order of hidden states, [T, ...]."""
            return batch.token_extras[f"{EXTRA}{name}"].transpose(0, 1).flatten(0, 1)

        if self.targets.header.what != HIDDEN:
            assert depth is None, "top-k is of the next token alone"
            return TopTokens(taken(TOKENS), taken(LOGITS), taken(LOG_SUM))
        if self._head is None:
            part = self.targets.head_part(student.group, len(student.weight))
            self._head = replace(part, weight=part.weight.to(student.weight.device))
        hidden = taken(HIDDEN if depth is None else mtp_hidden(depth))
        if hidden.dtype == torch.int16:  # as rows travel, since numpy has no bfloat16
            hidden = hidden.view(torch.bfloat16)
        return Reference(hidden.to(self._head.weight.dtype), self._head)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path) -> Any:
    """Map a file; its values are read when they are asked for."""
    return safe_open(path, framework="pt")


def _as_array(values: Tensor) -> NDArray[Any]:
    plain = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    found: NDArray[Any] = plain.numpy()
    return found


def _name_of(row: Row) -> str:
    return f"{row.identity.split.value} row {row.identity.number}"


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.of_content = True  # every rank that reads the row says so
    return error
