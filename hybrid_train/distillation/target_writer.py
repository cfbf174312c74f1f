"""Writes stored targets: runs a teacher over the rows of a run under any layout, file by file.

Data-parallel ranks share the files; what a file holds does not depend on them. A file gets its name
when it is whole, so a writer that was killed at any moment goes on with the files that are missing,
under any other layout. What is in a folder is said at its end, in `targets.json`.

Dimensions: as in `distillation/target_folder.py`.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch import distributed as dist

from hybrid_train.data.batch import Batch, Row, RowReader, stack
from hybrid_train.distillation.target_folder import (
    DIGESTS,
    HEAD,
    HEADER,
    HIDDEN,
    LOG_SUM,
    LOGITS,
    SUMS,
    TOKENS,
    UNFINISHED,
    Header,
    Part,
    bytes_of_head,
    bytes_of_rows,
)
from hybrid_train.distillation.targets import digest_of, sum_of
from hybrid_train.distillation.teachers import Teacher
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.ops.context import in_order
from hybrid_train.ops.logits import HeadPart, MostLikely, read
from hybrid_train.runtime import ranks
from hybrid_train.schema.formats import STORED_TARGETS, require_readable_folder, write_stamp
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes, show_tokens
from hybrid_train.training.network import Network

_log = logging.getLogger(__name__)
_HALF = ".half"  # what the name of a file ends in until it is whole
_LINE_S = 30.0  # between lines of progress


@dataclass(frozen=True)
class PartRows:
    """Where the rows of a part are read, and how many a microbatch of the teacher has."""

    part: Part
    read: RowReader
    microbatch: int


@dataclass(frozen=True)
class TargetWriter:
    """Writes a folder; every process of the layout makes the same calls.

    Attributes:
        folder: of the targets.
        header: what it will hold.
        teacher: on its layout.
        parts: the rows, in the order of the header.
    """

    folder: Path
    header: Header
    teacher: Teacher
    parts: Sequence[PartRows]

    def write(self) -> bool:
        """Write what is missing; return whether anything was.

        Raises:
            UserError: if something else is in the folder, it does not fit on the disk, or the
                teacher gives numbers that are not finite.
        """
        missing = ranks.broadcast_from_main(self._begin)
        if missing is None:
            return False
        if any(missing):
            _log.info("%s, were nothing there", self._time_in_words())
            if self.header.what == HIDDEN:
                ranks.all_or_none(self._keep_head)
            self._write_all(missing)
        ranks.run_on_main_first(self._finish)
        return True

    def estimate(self) -> str:
        """Say how large all files are and how long they take, of a microbatch that is timed."""
        everything = [range(part.files) for part in self.header.parts]
        needed = self._bytes_of(everything) + self._bytes_of_head
        rows = sum(part.rows for part in self.header.parts)
        return f"{counted(rows, 'row')} take {show_bytes(needed)}; {self._time_in_words()}"

    def _write_all(self, missing: Sequence[Sequence[int]]) -> None:
        started = said = time.monotonic()
        rounds = list(self._rounds(missing))
        for done, (rows, files) in enumerate(rounds, start=1):
            self._write_round(rows, files)
            now = time.monotonic()
            if now - said > _LINE_S:
                said, left = now, (now - started) / done * (len(rounds) - done)
                _log.info("%d of %d rounds of files, about %.0f s left", done, len(rounds), left)

    def _begin(self) -> list[list[int]] | None:
        """Claim the folder; return which files of each part are missing, None if it is whole."""
        for name, state in ((HEADER, "targets"), (UNFINISHED, "unfinished targets")):
            if (self.folder / name).is_file():
                require_readable_folder(self.folder, STORED_TARGETS)
                text = (self.folder / name).read_text(encoding="utf-8")
                found = Header.of(json.loads(text), self.folder)
                if other := self.header.differences(found):
                    raise UserError(
                        f"output={self.folder} holds {state} of another teacher, run or kind "
                        f"(other: {', '.join(other)}); give another output=..., or remove it"
                    )
                if name == HEADER:
                    return None
                break
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(not one.name.endswith(_HALF) for one in self.folder.iterdir()):
                raise UserError(f"output={self.folder} is not empty, and holds no targets")
            write_whole(self.folder / UNFINISHED, self.header.as_text().encode())
        write_stamp(self.folder, STORED_TARGETS)
        for half in self.folder.rglob(f"*{_HALF}"):
            half.unlink()
        missing = []
        for part in self.header.parts:
            (self.folder / part.name).mkdir(exist_ok=True)
            files = range(part.files)
            missing.append([one for one in files if not part.path(self.folder, one).is_file()])
        self._require_space(missing)
        return missing

    def _bytes_of(self, missing: Sequence[Sequence[int]]) -> int:
        """Return what files of each part take."""
        width = self.header.width(hidden_size_of(self.teacher.network))
        return sum(
            bytes_of_rows(len(part.rows_of(file)), part.length, width)
            for part, files in zip(self.header.parts, missing, strict=True)
            for file in files
        )

    @property
    def _bytes_of_head(self) -> int:
        if self.header.what != HIDDEN:
            return 0
        own = dtype_of(self.teacher.network)
        return bytes_of_head(self.header.vocab_size, hidden_size_of(self.teacher.network), own)

    def _require_space(self, missing: Sequence[Sequence[int]]) -> None:
        needed = self._bytes_of(missing)
        needed += 0 if (self.folder / HEAD).is_file() else self._bytes_of_head
        free = shutil.disk_usage(self.folder).free
        count = counted(sum(map(len, missing)), "file")
        _log.info("targets: %s in %s to be written to %s", show_bytes(needed), count, self.folder)
        if free < needed:
            raise UserError(
                f"the disk is full: the targets need {show_bytes(needed)}, and {self.folder} has "
                f"{show_bytes(free)} free; free space, choose another output=..., or what=top_k"
            )

    def _time_in_words(self) -> str:
        """Run a microbatch twice, and say how long all of them take."""
        one, groups = self.parts[0], self.teacher.network.groups
        batches = [stack([one.read(0)] * one.microbatch)] * self.teacher.network.passes_multiple
        self._said_of(batches)  # the first pass of a process takes longer
        start = time.monotonic()
        self._said_of(batches)
        pace = (time.monotonic() - start) / (len(batches) * one.microbatch * one.part.length)
        pace /= groups.dp.size()
        tokens = sum(part.rows * part.length for part in self.header.parts)
        return f"{show_tokens(tokens)} tokens, {1 / pace:.0f} a second: about {tokens * pace:.0f} s"

    def _rounds(self, missing: Sequence[Sequence[int]]) -> Iterator[tuple[PartRows, Sequence[int]]]:
        """Yield what data-parallel ranks write at once: files of one part, one each."""
        size = self.teacher.network.groups.dp.size()
        for rows, files in zip(self.parts, missing, strict=True):
            for first in range(0, len(files), size):
                yield rows, files[first : first + size]

    def _write_round(self, rows: PartRows, files: Sequence[int]) -> None:
        part, rank = rows.part, self.teacher.network.groups.dp.rank()
        count = max(len(part.rows_of(file)) for file in files)
        own = part.rows_of(files[rank]) if rank < len(files) else range(0)
        read = [rows.read(number) for number in own]
        fill = (read[0] if read else rows.read(0)).without_labels()
        step = rows.microbatch * self.teacher.network.passes_multiple
        filled = [*read, *[fill] * (-(-count // step) * step - len(read))]
        size = rows.microbatch
        batches = [stack(filled[one : one + size]) for one in range(0, len(filled), size)]
        found = self._said_of(batches)
        if (
            not own
            or not found
            or self.teacher.network.groups.tp.rank()
            or self.teacher.network.groups.cp.rank()
        ):
            ranks.all_or_none(lambda: None)
            return
        tensors = {
            name: torch.cat([one[name] for one in found])[: len(own)].contiguous()
            for name in found[0]
        }
        path = part.path(self.folder, files[rank])
        ranks.all_or_none(lambda: self._write_file(path, read, tensors))

    def _write_file(self, path: Path, rows: Sequence[Row], tensors: dict[str, Tensor]) -> None:
        """Write rows whole.

        Raises:
            UserError: if a number is not finite.
        """
        for name, values in tensors.items():
            for row, one in zip(rows, values, strict=True):
                if not bool(one.isfinite().all()):
                    raise UserError(
                        f"the teacher {self.header.teacher['source']} gives numbers that are not "
                        f"finite ({name} of {row.identity.split.value} row {row.identity.number})"
                    )
        sums = [sum_of(one) for one in zip(*tensors.values(), strict=True)]
        told = {DIGESTS: [digest_of(row) for row in rows], SUMS: sums}
        whole = {**{key: torch.tensor(value) for key, value in told.items()}, **tensors}
        write_whole(path, save(whole))

    def _finish(self) -> None:
        (self.folder / UNFINISHED).replace(self.folder / HEADER)

    def _said_of(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Run the teacher; return what is stored of each microbatch, [B, L, ...], on a last stage.

        Tensor and context ranks have the same.
        """
        network, with_mtp = self.teacher.network, self.header.mtp_depths > 0
        own = [network.own(batch) for batch in batches]
        slots = self.teacher.run_ahead(own, with_mtp=with_mtp)
        return [self._stored(slot) for slot in slots] if self._is_last_stage else []

    @property
    def _is_last_stage(self) -> bool:
        group = self.teacher.network.groups.pp
        return bool(group.rank() == group.size() - 1)

    def _stored(self, batch: Batch) -> dict[str, Tensor]:
        """Return what is stored of a microbatch with its slot."""
        depths = (None, *range(self.header.mtp_depths))
        found = [self.teacher.reference(batch, self._head, depth) for depth in depths]
        kind, shape = getattr(torch, self.header.dtype), batch.tokens.t().shape
        if self.header.what == HIDDEN:
            return {
                name: self._whole(one.hidden.to(kind).view(*shape, -1))
                for name, one in zip(self.header.names, found, strict=True)
            }
        assert self.header.top_k is not None, "top-k without a number"
        reading, head = MostLikely(self.header.top_k), replace(found[0].head, sequence_split=False)
        places = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
        values = self._whole(read(found[0].hidden, head, reading, places).view(*shape, -1))
        tokens, logits, log_sum = values.split([reading.number, reading.number, 1], dim=-1)
        return {TOKENS: tokens.int(), LOGITS: logits.to(kind), LOG_SUM: log_sum[..., 0].float()}

    def _whole(self, values: Tensor) -> Tensor:
        """Gather what each context rank has, [S, B, ...], to [B, L, ...] on the CPU."""
        group = self.teacher.network.groups.cp
        if group.size() > 1:
            pieces = [torch.empty_like(values) for _ in range(group.size())]
            dist.all_gather(pieces, values.contiguous(), group=group)
            values = in_order(torch.cat(pieces), group.size(), dim=0)
        return values.transpose(0, 1).cpu()

    @property
    def _head(self) -> HeadPart:
        """This rank's rows of the teacher's head, on a last stage."""
        chunk = self.teacher.network.chunks[-1]
        assert isinstance(chunk, Hybrid), "a frozen network is not wrapped"
        return chunk.head().part

    def _keep_head(self) -> None:
        """Write the teacher's head without its padding; the last stages call this together."""
        groups = self.teacher.network.groups
        if not self._is_last_stage:
            return
        part = self._head
        whole = part.weight
        if part.group is not None:
            whole = whole.new_empty(groups.tp.size() * len(whole), whole.shape[1])
            dist.all_gather_into_tensor(whole, part.weight.contiguous(), group=part.group)
        if not any(one.rank() for one in (groups.tp, groups.cp, groups.dp)):
            head = whole[: self.header.vocab_size].cpu().contiguous()
            write_whole(self.folder / HEAD, save({HEAD: head}))


def hidden_size_of(network: Network) -> int:
    """Return the hidden units of a network."""
    return int(network.chunks[0].config.hidden_size)


def dtype_of(network: Network) -> str:
    """Return what the weights of a network are held in, by its name in torch."""
    return str(next(network.chunks[0].parameters()).dtype).removeprefix("torch.")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all, whenever the writer is killed."""
    half = path.with_name(path.name + _HALF)
    with half.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
