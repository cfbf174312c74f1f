"""Arrays on disk that are built once and then read by every process that needs them.

The name of a file is a digest of all that its content depends on, the fingerprint of the data
included: what is found under the name is right, and what is stale is never found. A file appears
whole: it is written beside its place and renamed, so any number of processes may build the same.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.documents import Joined
from hybrid_train.schema.formats import INDEX
from hybrid_train.schema.problems import UserError

_KEEP_FROM = 2**19  # documents; the index of fewer is built faster than it is agreed upon


class IndexCache:
    """A folder of arrays, or none: then everything is built in memory."""

    def __init__(self, folder: Path | None, keep_from: int = _KEEP_FROM) -> None:
        self._folder = folder
        self._keep_from = keep_from

    def keeps(self, documents: int) -> bool:
        """Tell whether the index of a source of so many documents is kept on disk."""
        return self._folder is not None and documents >= self._keep_from

    def folder_of(self, sizes: Iterable[int]) -> Path | None:
        """Return the folder if the index of any source of so many documents is kept there."""
        return self._folder if any(map(self.keeps, sizes)) else None

    def array(
        self,
        name: tuple[object, ...],
        documents: Joined,
        build: Callable[[], NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        """Return an array: from the disk if it is there, else built, and kept if it is large.

        Args:
            name: what the array depends on beside the documents; the first word says what it is.
            documents: what it is an index of.
            build: makes it.

        Raises:
            UserError: if the folder cannot be written or read.
        """
        if self._folder is None or not self.keeps(len(documents)):
            return build()
        path = self._folder / f"{name[0]}-{_digest(name, documents)}.npy"
        try:
            if not path.exists():
                _write(path, build())
            found: NDArray[np.int64] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot keep the index of the data in {path}: {error}; set data.cache to a folder "
                "with free space that all processes can reach, or delete this file"
            ) from error
        return found


def _digest(name: tuple[object, ...], documents: Joined) -> str:
    text = repr((INDEX.version, tuple(map(str, name)), documents.fingerprint()))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(path: Path, array: NDArray[np.int64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with half.open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
