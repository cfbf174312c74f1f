"""The bytes of a file, whether it lies in a folder or behind a URL."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.block_cache import CachedFile
from hybrid_train.data.remote import is_remote
from hybrid_train.schema.source import Remote


class File(Protocol):
    """A file that can be read anywhere."""

    name: str  # for messages: path or URL
    size: int  # bytes

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), of which those near them will be read too."""

    def peek(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), few and far from others."""

    def whole(self) -> NDArray[np.uint8]:
        """All bytes, mapped from a local file."""


class LocalFile:
    """A file of a folder, mapped into memory."""

    def __init__(self, path: str) -> None:
        self.name = path
        self.size = Path(path).stat().st_size
        # An empty file cannot be mapped. A plain array: slicing a memmap takes ten times as long.
        mapped = np.memmap(path, dtype=np.uint8, mode="r") if self.size else np.zeros(0, np.uint8)
        self._bytes: NDArray[np.uint8] = np.asarray(mapped)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), a view."""
        return self._bytes[start:stop]

    peek = read

    def whole(self) -> NDArray[np.uint8]:
        """All bytes, a view."""
        return self._bytes


def open_file(path: str, remote: Remote | None = None) -> File:
    """Open a local path or a URL.

    Args:
        path: either.
        remote: how a URL is read; the defaults if None.

    Raises:
        FileNotFoundError: if a local file does not exist.
        UserError: as `RemoteFile`, if it is a URL.
    """
    return CachedFile(path, remote or Remote()) if is_remote(path) else LocalFile(path)
