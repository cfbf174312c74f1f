"""Token files that appear whole or not at all: a folder beside the output until they are done."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hybrid_train.schema.problems import UserError

# The .idx comes last: whoever looks for token files looks for it.
_SUFFIXES = (".bin", ".bad.jsonl", ".json", ".idx")


class Output:
    """Files of one prefix on their way; PREFIX.partial/ holds them.

    Args:
        prefix: of the files when they are done.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.folder = Path(f"{prefix}.partial")

    def path(self, suffix: str) -> Path:
        """Return where a file lies until it is done."""
        return self.folder / f"tokens{suffix}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out; a killed process lets go by itself.

        Raises:
            UserError: if another process writes here, or nobody can.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"another process is writing {self.prefix}; wait for it, or choose "
                        "another output="
                    ) from None
                yield
        except OSError as error:
            raise UserError(_cannot_write(self.prefix, self.folder, error)) from error

    def refuse_existing(self) -> None:
        """Refuse to replace files of the prefix.

        Raises:
            UserError: names them.
        """
        there = [self.prefix + suffix for suffix in _SUFFIXES if _exists(self.prefix + suffix)]
        if there:
            raise UserError(
                f"{', '.join(there)} exists; choose another output=, or replace it: overwrite=true"
            )

    def publish(self) -> None:
        """Move the files to their place, where older ones are replaced. Can be done again."""
        if self.path(_SUFFIXES[0]).exists():  # nothing is moved yet
            for suffix in reversed(_SUFFIXES):  # so that there is no moment with a foreign .bin
                Path(self.prefix + suffix).unlink(missing_ok=True)
        for suffix in _SUFFIXES:
            if self.path(suffix).exists():
                self.path(suffix).replace(self.prefix + suffix)
        _sync_folder(Path(self.prefix).parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _cannot_write(prefix: str, folder: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"the disk is full: {folder}; free some space, and the same command goes on from the "
            "last saved position"
        )
    place = error.filename or folder
    return f"output={prefix} cannot be written: {place}: {error.strerror or error}"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a power cut, finds the old content or the new."""
    half = path.with_name(f"{path.name}.new")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def sync(files: Mapping[str, IO[bytes]]) -> None:
    """Bring open files to the disk."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
