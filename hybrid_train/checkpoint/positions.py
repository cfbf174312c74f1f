"""Files read and written at a given position, by several threads at once."""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Linux keeps what is written at once in one piece of memory if it can. A virtual machine gives its
# large pieces back while they are free; 2 GB in pieces of 1 MB and more took 5 times as long as in
# these, which a copy by the system uses too.
_WRITTEN_AT_ONCE = 2**18


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class OpenFiles:
    """Files that are opened when they are first read, and stay open."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __getitem__(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def fill(self, path: Path, position: int, tensor: Tensor) -> bool:
        """Read the bytes of a contiguous tensor; False if the file ends before."""
        descriptor, view = self[path], bytes_of(tensor)
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if not got:
                return False
            view, position = view[got:], position + got
        return True

    def close(self) -> None:
        """Close all of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor will stand in an open file, and what stands around them."""

    descriptor: int
    position: int
    before: bytes = b""
    behind: bytes = b""

    def write(self, values: Tensor) -> None:
        """Write the values, and what stands around them."""
        around = self.before, bytes_of(values.contiguous()), self.behind
        write_at(self.descriptor, self.position, around)


def write_at(descriptor: int, position: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts one behind the other, all bytes of them."""
    for part in parts:
        left = memoryview(part)
        while len(left):
            done = os.pwrite(descriptor, left[:_WRITTEN_AT_ONCE], position)
            left, position = left[done:], position + done
