"""Writes stored targets: runs a teacher over the rows of a run under any layout, file by file.

Data-parallel ranks share the files; what a file holds does not depend on them. A file gets its name
when it is whole, so a writer that was killed at any moment goes on with the files that are missing,
under any other layout. What is in a folder is said at its end, in `targets.json`.

Dimensions: as in `distillation/targets.py`.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch import distributed as dist

from hybrid_train.data.batch import Batch, Row, RowReader, stack
from hybrid_train.distillation.targets import (
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
    digest_of,
    mtp_hidden,
    sum_of,
)
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.ops.context import in_order
from hybrid_train.ops.divergence import MostLikely
from hybrid_train.runtime import heartbeat, ranks
from hybrid_train.schema.formats import STORED_TARGETS, write_stamp
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes
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
        network: the teacher.
        parts: the rows, in the order of the header.
    """

    folder: Path
    header: Header
    network: Network
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
        with self.network.evaluating():
            self._say_time(sum(map(len, missing)))
            started = said = time.monotonic()
            done, rounds = 0, list(self._rounds(missing))
            for rows, files in rounds:
                self._write_round(rows, files)
                done += 1
                if time.monotonic() - said > _LINE_S:
                    said = time.monotonic()
                    left = (said - started) / done * (len(rounds) - done)
                    _log.info(
                        "%d of %d rounds of files, about %.0f s left", done, len(rounds), left
                    )
        ranks.run_on_main_first(self._finish)
        return True

    def _begin(self) -> list[list[int]] | None:
        """Claim the folder; return which files of each part are missing, None if it is whole."""
        for name, state in ((HEADER, "targets"), (UNFINISHED, "unfinished targets")):
            if (self.folder / name).is_file():
                found = Header.read(self.folder / name)
                if other := self.header.differences(found):
                    raise UserError(
                        f"output={self.folder} holds {state} of another teacher, run or kind "
                        f"(other: {', '.join(other)}); give another output=..., or remove it"
                    )
                if name == HEADER:
                    return None
                break
        else:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"output={self.folder} is not empty, and holds no targets")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_stamp(self.folder, STORED_TARGETS)
            write_whole(self.folder / UNFINISHED, self.header.as_text().encode())
        for half in self.folder.rglob(f"*{_HALF}"):
            half.unlink()
        missing = []
        for part in self.header.parts:
            (self.folder / part.name).mkdir(exist_ok=True)
            files = range(part.files)
            missing.append([one for one in files if not part.path(self.folder, one).is_file()])
        self._require_space(missing)
        return missing

    def _require_space(self, missing: Sequence[Sequence[int]]) -> None:
        needed = sum(
            len(part.rows_of(file)) * part.length * bytes_per_token(self.header, self._width)
            for part, files in zip(self.header.parts, missing, strict=True)
            for file in files
        )
        free = shutil.disk_usage(self.folder).free
        count = counted(sum(map(len, missing)), "file")
        _log.info("targets: %s in %s to be written to %s", show_bytes(needed), count, self.folder)
        if free < needed:
            raise UserError(
                f"the disk is full: the targets need {show_bytes(needed)}, and {self.folder} has "
                f"{show_bytes(free)} free; free space, choose another output=..., or what=top_k"
            )

    @property
    def _width(self) -> int:
        return int(self.network.chunks[0].config.hidden_size)

    def _say_time(self, files: int) -> None:
        """Run two microbatches, of which the first also gives the head; say how long all take."""
        if not files:
            return
        one = self.parts[0]
        rows = [one.read(0)] * one.microbatch
        self._run([stack(rows)], one.part.length, keep_head=True)
        start = time.monotonic()
        self._run([stack(rows)], one.part.length)
        pace = (time.monotonic() - start) / (one.microbatch * one.part.length)
        ranks_of_data = self.network.groups.dp.size()
        tokens = sum(part.rows * part.length for part in self.header.parts)
        _log.info(
            "%s tokens at %.0f a second: about %.0f s for a folder without any file",
            *(f"{tokens:,}", ranks_of_data / pace, tokens * pace / ranks_of_data),
        )

    def _rounds(self, missing: Sequence[Sequence[int]]) -> Iterator[tuple[PartRows, Sequence[int]]]:
        """Yield what data-parallel ranks write at once: files of one part, one each."""
        size = self.network.groups.dp.size()
        for rows, files in zip(self.parts, missing, strict=True):
            for first in range(0, len(files), size):
                yield rows, files[first : first + size]

    def _write_round(self, rows: PartRows, files: Sequence[int]) -> None:
        part, rank = rows.part, self.network.groups.dp.rank()
        count = max(len(part.rows_of(file)) for file in files)
        own = part.rows_of(files[rank]) if rank < len(files) else range(0)
        read = [rows.read(number) for number in own]
        fill = (read[0] if read else rows.read(0)).without_labels()
        step = rows.microbatch * self.network.passes_multiple
        filled = [*read, *[fill] * (-(-count // step) * step - len(read))]
        size = rows.microbatch
        batches = [stack(filled[one : one + size]) for one in range(0, len(filled), size)]
        found = self._run(batches, part.length)
        if not own or not found or self.network.groups.tp.rank() or self.network.groups.cp.rank():
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
                        f"the teacher {self.header.teacher['path']} gives numbers that are not "
                        f"finite ({name} of {row.identity.split.value} row {row.identity.number})"
                    )
        sums = [sum_of(one) for one in zip(*tensors.values(), strict=True)]
        told = {DIGESTS: [digest_of(row) for row in rows], SUMS: sums}
        whole = {**{key: torch.tensor(value) for key, value in told.items()}, **tensors}
        write_whole(path, save(whole))

    def _finish(self) -> None:
        (self.folder / UNFINISHED).replace(self.folder / HEADER)

    def _run(
        self, batches: list[Batch], length: int, *, keep_head: bool = False
    ) -> list[dict[str, Tensor]]:
        """Run microbatches; return what is stored of each, [B, L, ...], on a last stage."""
        depths = self.header.mtp_depths

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            heartbeat.enter(heartbeat.last().part)  # still there
            batch = next(iterator)
            output = model(
                batch.tokens,
                batch.position_ids if depths else None,
                sequence_index=batch.sequence_index,
                padding=batch.padding,
                read=lambda outputs: self._read(outputs, batch.tokens.shape, keep_head=keep_head),
            )
            return output, _report

        batches = batches * (self.network.passes_multiple if keep_head else 1)
        return run_schedule(
            self.network.chunks,
            forward_step,
            [self.network.own(batch) for batch in batches],
            shape=(len(batches[0].tokens), length),
            forward_only=True,
        )

    def _read(self, outputs: Outputs, shape: torch.Size, *, keep_head: bool) -> dict[str, Tensor]:
        """Return what is stored of a microbatch."""
        part, (rows, length) = outputs.head.part, shape
        if keep_head and self.header.what == HIDDEN:
            self._keep_head(part.weight, part.group)

        def whole(values: Tensor) -> Tensor:
            """Gather [S x B, ...] of this context rank to [B, L, ...] on the CPU."""
            values, group = values.view(length, rows, *values.shape[1:]), self.network.groups.cp
            if group.size() > 1:
                pieces = [torch.empty_like(values) for _ in range(group.size())]
                dist.all_gather(pieces, values.contiguous(), group=group)
                values = in_order(torch.cat(pieces), group.size(), dim=0)
            return values.transpose(0, 1).cpu()

        if self.header.what == HIDDEN:
            names = [HIDDEN, *(mtp_hidden(depth) for depth in range(self.header.mtp_depths))]
            states = (outputs.hidden, *outputs.mtp_hidden)
            kind = self.header.torch_dtype
            return {
                name: whole(part.gathered(one).to(kind))
                for name, one in zip(names, states, strict=True)
            }
        number = self.header.top_k
        assert number is not None, "top-k without a number"
        places = torch.arange(rows * length, device=outputs.hidden.device)
        values = whole(outputs.head.read(outputs.hidden, MostLikely(number), places))
        tokens, logits, log_sum = values.split([number, number, 1], dim=-1)
        return {
            TOKENS: tokens.int(),
            LOGITS: logits.to(self.header.torch_dtype),
            LOG_SUM: log_sum.squeeze(-1).float(),
        }

    def _keep_head(self, weight: Tensor, group: dist.ProcessGroup | None) -> None:
        """Write the teacher's head without its padding."""
        whole = weight
        if group is not None:
            whole = weight.new_empty(group.size() * len(weight), weight.shape[1])
            dist.all_gather_into_tensor(whole, weight.contiguous(), group=group)
        groups = self.network.groups
        if not any(one.rank() for one in (groups.tp, groups.cp, groups.dp)):
            head = whole[: self.header.vocab_size].cpu().contiguous()
            write_whole(self.folder / HEAD, save({HEAD: head}))


def bytes_per_token(header: Header, hidden_size: int) -> int:
    """Return what a token of a row takes on disk."""
    size = header.torch_dtype.itemsize
    if header.what == HIDDEN:
        return (1 + header.mtp_depths) * hidden_size * size
    assert header.top_k is not None, "top-k without a number"
    return header.top_k * (4 + size) + 4


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all, whenever the writer is killed."""
    half = path.with_name(path.name + _HALF)
    with half.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def _report(found: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    none = torch.zeros(())
    return none, none.int(), found
