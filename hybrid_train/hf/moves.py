"""Moves: blocks of rows that are read, checked, cast and written by several threads at once.

The threads are those of concurrent.futures; the library safetensors has nothing for it, and
`safetensors.py` says why its reader and writer do not serve.

Every block has its place before the first is read, so what is written, and which error is said,
does not depend on the number of threads.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hybrid_train.checkpoint.positions import Place
from hybrid_train.hf.tensors import BLOCK_BYTES, Block, Cast, Rows, require_finite

_MOST_THREADS = 8  # more of them wait for each other: one at a time writes to a file
_WAITING = 16  # loads that are planned ahead of the one that must be done next
_SWITCH_S = 1e-4  # of Python's threads; the usual 5 ms are longer than it takes to read a block


@dataclass(frozen=True)
class Move:
    """A block of one side, and where it goes."""

    block: Block
    dtype: torch.dtype  # that it gets
    place: Place


def carry_out(moves: Iterable[Move], side: Rows, cast: Cast) -> None:
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
