"""Tensors on their way from one side to the other: cut into blocks, checked for NaN, cast, written.

A tensor is never in memory as a whole if it is large: it travels in blocks of rows, which several
threads move at once. Every block has its place before the first is read, so what is written, and
which error is said, does not depend on the number of threads. The threads are those of
concurrent.futures; the library safetensors has nothing for it, and `hf/safetensors.py` says why its
reader and writer do not serve.
"""

import contextlib
import enum
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from hybrid_train.checkpoint.tensor_files import CheckpointWriter, FilePosition
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

BLOCK_BYTES = 4 * 2**20  # of a large tensor; it is read, checked and written within the cache
_MOST_THREADS = 8  # more of them wait for each other: one at a time writes to a file
_WAITING = 16  # loads that are planned ahead of the one that must be done next
_SWITCH_S = 1e-4  # of Python's threads; the usual 5 ms are longer than it takes to read a block


class Rows(Protocol):
    """A side that can be read."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def where(self, name: str) -> str: ...

    def read(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a tensor of one side, and the shape that they have on the other."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows as they are."""
        return math.prod(self.shape) * self.dtype.itemsize


def blocks(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into ranges of a few megabytes."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def require_shapes(side: Rows, names: Mapping[str, tuple[int, ...]], present: set[str]) -> None:
    """Refuse tensors that are missing, of another shape, or of no use.

    Raises:
        UserError: naming the first of each kind, and how many there are.
    """
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(
            f"{_first(missing)} missing; the config asks for {'them' if len(missing) > 1 else 'it'}"
        )
    for name, shape in names.items():
        if side.shape(name) != shape:
            raise UserError(
                f"{side.where(name)} has shape {side.shape(name)}; the config asks for {shape}"
            )
    foreign = sorted(present - names.keys())
    if foreign:
        raise UserError(
            f"{side.where(foreign[0])} has no place in the model; {_first(foreign)} left over"
        )


def _first(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {counted(len(names) - 1, 'other tensor')} are"


def require_finite(side: Rows, name: str, rows: Tensor, start: int) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: naming file, tensor and row.
    """
    low, high = rows.aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        flat = rows.view(-1)
        number = int((~flat.isfinite()).nonzero()[0, 0])
        row = start + number // max(1, math.prod(rows.shape[1:]))
        raise UserError(f"{side.where(name)} holds {flat[number].item()} in row {row}")


class Format(enum.Enum):
    """A number format by its name in a config.json."""

    float32 = torch.float32
    bfloat16 = torch.bfloat16
    float16 = torch.float16


@dataclass
class Cast:
    """The number format that is asked for, and what came of it; several threads may cast."""

    dtype: torch.dtype | None  # None: as it is
    changed: set[str] = field(default_factory=set)  # tensors that lost bits
    largest: float = 0.0  # relative change of an element
    _noting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, source: torch.dtype, *, keeps_float32: bool) -> torch.dtype:
        """Return the format that a tensor gets."""
        if keeps_float32:
            return torch.float32
        return self.dtype or source

    def apply(self, name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast rows; take note if that loses bits."""
        if rows.dtype == dtype:
            return rows
        changed = rows.to(dtype)
        back = changed.to(torch.float32)
        exact = rows.to(torch.float32)
        if not torch.equal(back, exact):
            change = ((back - exact).abs() / exact.abs().clamp(min=1e-30)).max().item()
            with self._noting:
                self.changed.add(name)
                self.largest = max(self.largest, change)
        return changed

    def in_words(self, tensors: int) -> str | None:
        """Say what was lost; None if nothing was."""
        if not self.changed:
            return None
        return (
            f"the cast to {str(self.dtype).removeprefix('torch.')} is lossy: it changed "
            f"{len(self.changed)} of {tensors} tensors, "
            f"one element by a relative {self.largest:.1e}"
        )


@dataclass(frozen=True)
class Move:
    """A block of one side, and where it goes."""

    block: Block
    dtype: torch.dtype  # that it gets
    place: FilePosition


@dataclass(frozen=True)
class Copied:
    """A tensor that is copied: from which name, to which, in which format."""

    source: str
    key: str
    dtype: torch.dtype


def moves(copied: Iterable[Copied], side: Rows, writer: CheckpointWriter) -> Iterator[Move]:
    """Cut what is copied into blocks of rows, each with its place in the new checkpoint."""
    for one in copied:
        shape, dtype = side.shape(one.source), side.dtype(one.source)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        for first, last in blocks(0, shape[0], row_bytes):
            block = Block(one.source, first, last, (last - first, *shape[1:]), dtype)
            place = writer.place(one.key, shape, first, block.shape, one.dtype)
            yield Move(block, one.dtype, place)


def move_all(moves: Iterable[Move], side: Rows, cast: Cast) -> None:
    """Move all blocks.

    Raises:
        UserError: of the first block that is damaged, or holds NaN or infinity.
    """

    def carry(load: list[Move]) -> None:
        for move in load:
            block = move.block
            rows = side.read(block.name, block.start, block.stop)
            require_finite(side, block.name, rows, block.start)
            move.place.write(cast.apply(block.name, rows, move.dtype))

    with _one_thread_each(), ThreadPoolExecutor(_threads()) as threads:
        waiting: deque[Future[None]] = deque()
        for load in _loads(moves):
            waiting.append(threads.submit(carry, load))
            if len(waiting) > _WAITING:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def _loads(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Put small blocks together, so that a thread has some work before it asks for more."""
    load: list[Move] = []
    total = 0
    for move in moves:
        load.append(move)
        total += move.block.num_bytes
        if total >= BLOCK_BYTES:
            yield load
            load, total = [], 0
    if load:
        yield load


def _threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let a block be worked on by one thread, else those of torch would wait for each other."""
    threads, switch = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(switch)
