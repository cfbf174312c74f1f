"""Stored targets: what a teacher says of the rows of a run, written once, read under any layout.

What is in a folder: `distillation/target_folder.py`. A row of training is found by
its position in tokens, so batches, ramps and layouts do not matter; a row of a validation by what
is in it, since phases cut validations otherwise. Each row has a digest of its tokens: a row that is
not the one that was read by the teacher is refused.

Dimensions: B rows of a microbatch, L tokens of a row, S those of a context rank,
T = S x B, H hidden units of the teacher, K tokens that are told apart.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist

from hybrid_train.data.batch import Batch, Row
from hybrid_train.data.record import changes
from hybrid_train.distillation.target_folder import (
    DIGESTS,
    HEAD,
    HIDDEN,
    LOG_SUM,
    LOGITS,
    SUMS,
    TOKENS,
    Header,
    Part,
    mtp_hidden,
    read_header,
)
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.ops.context import own_chunks
from hybrid_train.ops.logits import HeadPart
from hybrid_train.ops.reference import Reference, Target, TopTokens
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.runtime import ranks
from hybrid_train.schema.data import Split
from hybrid_train.schema.objective import Distill, MtpTarget, ObjectiveSettings
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

ROW = "target_row"  # row_extras: which row it is
_EXTRA = "target_"  # what the names of a file begin with as extra fields of a batch
_OPEN_FILES = 8  # of one process; a step reads from one or two


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
    return Targets(path, read_header(path))


def targets_of(objective: ObjectiveSettings) -> list["Targets"]:
    """Return the stored targets of an objective, a row transform; empty where it reads none."""
    if not isinstance(objective, Distill) or objective.targets is None:
        return []
    return [open_targets(objective.targets)]


@dataclass(frozen=True)
class _Asked:
    """A row whose targets are asked for.

    Attributes:
        split: train or validation.
        number: of the row within its phase or validation.
        position: tokens of the run, or of the validation, before it.
        digest: of what is in it.
        length: its tokens.
    """

    split: Split
    number: int
    position: int
    digest: int
    length: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.split.value} row {self.number}"


@dataclass(frozen=True)
class Targets:
    """The stored targets of a run, a row transform.

    Every process knows of its rows which ones they are; who needs their targets reads them: see
    `StoredTeacher`.
    """

    folder: Path
    header: Header

    def __call__(self, row: Row) -> Row:
        """Return a row that says which one it is, as an extra field `target_row`, [4]."""
        one = row.identity
        said = [one.split is Split.validation, one.number, one.position, digest_of(row)]
        return replace(row, row_extras={**row.row_extras, ROW: np.array(said, dtype=np.int64)})

    def read(self, said: Sequence[int], length: int) -> dict[str, Tensor]:
        """Return what is stored of a row by its names, each [L, ...].

        Args:
            said: what the row says of itself.
            length: its tokens.

        Raises:
            UserError: if there is nothing, or it is of another row, or damaged.
        """
        is_held_out, number, position, digest = said
        split = Split.validation if is_held_out else Split.train
        asked = _Asked(split, number, position, digest, length)
        part, place = self._place(asked)
        file, within = divmod(place, part.rows_per_file)
        path = part.path(self.folder, file)
        try:
            shard = _opened(path)
            if int(shard.get_slice(DIGESTS)[within]) != asked.digest:
                raise _refused(
                    f"{asked.label} is not the row that the teacher of {self.folder} read there: "
                    "data, seed or row transforms are others than those of hybrid-train "
                    "distill_targets"
                )
            found = {one: shard.get_slice(one)[within] for one in self.header.names}
            damaged = sum_of(found.values()) != int(shard.get_slice(SUMS)[within])
        except (OSError, SafetensorError) as error:
            raise _refused(f"{path} cannot be read: {error}") from error
        if damaged:
            raise _refused(f"{path} is damaged: {asked.label} has other bytes than were written")
        return found

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

    def _place(self, asked: _Asked) -> tuple[Part, int]:
        """Return the part of a row, and its number there."""
        length = asked.length
        if asked.split is Split.validation:
            found = self._held_out.get((length, asked.digest))
            if found is None:
                raise _refused(
                    f"{asked.label} has no target in {self.folder}: its teacher did not read it"
                )
            return found
        for part in self.header.parts:
            ahead = asked.position - part.start
            is_there = 0 <= ahead < part.rows * part.length and ahead % part.length == 0
            if part.split == Split.train.value and part.length == length and is_there:
                return part, ahead // length
        raise _refused(
            f"{asked.label} has no target in {self.folder}: no row of {length} tokens begins "
            f"there, after {asked.position:,} tokens of the run"
        )

    @cached_property
    def _held_out(self) -> dict[tuple[int, int], tuple[Part, int]]:
        """Places of the rows of validations, by their length and digest."""
        found = {}
        for part in self.header.parts:
            if part.is_validation:
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
    groups: ProcessGroups
    weight: float = 1.0
    _head: HeadPart | None = field(default=None, init=False)

    def run_ahead(self, batches: Sequence[Batch], *, with_mtp: bool) -> list[Batch]:
        """Read the targets of all microbatches; every process calls this.

        Returns:
            The microbatches; on the last pipeline stage, which alone reads, with their targets:
            token_extras `target_hidden` [B, S, H], or `target_tokens` [B, S, K] and so on.

        Raises:
            UserError: if they are not there, or of another row, or damaged; on all processes.
        """
        if with_mtp and not self.targets.header.mtp_depths:
            raise _refused(
                f"objective.targets={self.targets.folder} has none of the MTP depths: "
                "objective.mtp=cross_entropy or off, or write the hidden states of a teacher that "
                "has such depths, with objective.mtp=divergence"
            )
        found, failure = list(batches), None
        if self.groups.pp.rank() == self.groups.pp.size() - 1:
            try:
                found = [self._with_targets(batch) for batch in batches]
            except UserError as error:
                failure = error
        if batches:
            _say_on_all_ranks(failure, batches[0].tokens.device)
        return found

    def _with_targets(self, batch: Batch) -> Batch:
        length = batch.tokens.shape[1] * self.groups.cp.size()
        rows = [self.targets.read(row, length) for row in batch.row_extras[ROW].tolist()]
        extras = {}
        for name in self.targets.header.names:
            whole = torch.stack([row[name] for row in rows])
            own = own_chunks(whole, self.groups.cp.rank(), self.groups.cp.size(), dim=1)
            extras[f"{_EXTRA}{name}"] = own.to(batch.tokens.device)
        return replace(batch, token_extras={**batch.token_extras, **extras})

    def reference(self, batch: Batch, student: HeadPart, depth: int | None = None) -> Target:
        """Return what it has said of a microbatch; arguments as of a teacher that is there."""

        def taken(name: str) -> Tensor:
            """Bring values [B, S, ...] into the order of hidden states, [T, ...]."""
            return batch.token_extras[f"{_EXTRA}{name}"].transpose(0, 1).flatten(0, 1)

        if self.targets.header.what != HIDDEN:
            assert depth is None, "top-k is of the next token alone"
            return TopTokens(taken(TOKENS), taken(LOGITS), taken(LOG_SUM))
        if self._head is None:
            part = self.targets.head_part(student.group, len(student.weight))
            self._head = replace(part, weight=part.weight.to(student.weight.device))
        hidden = taken(HIDDEN if depth is None else mtp_hidden(depth))
        return Reference(hidden.to(self._head.weight.dtype), self._head)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path) -> Any:
    """Map a file; its values are read when they are asked for."""
    return safe_open(path, framework="pt")


def _say_on_all_ranks(failure: UserError | None, device: torch.device) -> None:
    """Raise on every process what one of them has found."""
    wrong = torch.tensor(float(failure is not None), device=device)
    dist.all_reduce(wrong)  # short, where nothing is wrong

    def fail() -> None:
        if failure is not None:
            raise failure

    if wrong.item():
        ranks.all_or_none(fail)


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process reads the same folder, or hears of it
    return error
