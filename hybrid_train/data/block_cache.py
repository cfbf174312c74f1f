"""Blocks of remote files in a local folder that all processes of a machine share.

A file of the folder is one block, or a whole file where `whole` was asked for. It appears by a
rename, complete or not at all; a file of another size than it should have is fetched anew. When the
folder holds more than its limit, the files least recently opened go; whoever has one mapped keeps
what is mapped.
"""

import contextlib
import fcntl
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.remote import RemoteFile
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.source import Remote

_MAPPED_BLOCKS = 64  # of each remote file in this process: address space, not memory


def default_folder() -> Path:
    """Where blocks go if the configuration names no folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hybrid_train" / "remote"


class CacheFolder:
    """Files by name in a folder with a limit.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._unchecked = limit_bytes  # bytes written since the last look at the whole: look first
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, size: int) -> NDArray[np.uint8] | None:
        """Map a file that is there with this size, and note that it was used."""
        path = self._folder / name
        with self._explained():
            try:
                if path.stat().st_size != size:
                    return None  # a disk that lost its last writes; the new one replaces it
                os.utime(path)
                return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            except FileNotFoundError:
                return None  # never there, or another process has made room

    def put(self, name: str, parts: Iterator[bytes]) -> NDArray[np.uint8]:
        """Write a file from its parts, map it, and make room if the folder is too large."""
        building = self._folder / f".{name}.{uuid.uuid4().hex}"
        with self._explained():
            try:
                with building.open("wb") as file:
                    for part in parts:
                        file.write(part)
                mapped = np.asarray(np.memmap(building, dtype=np.uint8, mode="r"))
                building.replace(self._folder / name)
            finally:
                building.unlink(missing_ok=True)
            self._unchecked += mapped.nbytes
            # A look at every file would take longer than a block if there are thousands.
            if self._unchecked > self._limit // 64:
                self._make_room(keep=name)
                self._unchecked = 0
        return mapped

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Let one process at a time go on, so that a large file is fetched once."""
        with self._explained(), (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, keep: str) -> None:
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    found = entry.stat()
                    files.append((found.st_mtime_ns, found.st_size, entry.name))
        total = sum(size for _, size, _ in files)
        if total <= self._limit:
            return
        # More than needed, so that this is not done for every block.
        goal = self._limit - self._limit // 16
        for _, size, name in sorted(files):
            if total <= goal:
                return
            if name != keep and not name.endswith(".lock"):
                (self._folder / name).unlink(missing_ok=True)
                total -= size

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot keep parts of remote files in {self._folder}: "
                f"{error.strerror or error}; free some space, or name another folder"
            ) from error


class CachedFile:
    """A remote file that is read through a cache folder; safe to use from several threads.

    Raises:
        UserError: as `RemoteFile` and `CacheFolder`.
    """

    def __init__(self, url: str, settings: Remote) -> None:
        self._remote = RemoteFile(url, tries=settings.tries, first_wait_s=settings.first_wait_s)
        folder = Path(settings.cache).expanduser() if settings.cache else default_folder()
        self._folder = CacheFolder(folder, settings.cache_bytes)
        self._block_bytes = settings.block_bytes
        self._read_ahead = settings.read_ahead
        self.name = url
        self.size = self._remote.size
        self._last = -1  # block
        self._begin()

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), through the blocks they lie in; a view if that is one block.

        As with a slice, there are fewer bytes where the file ends before `stop`.
        """
        stop = min(stop, self.size)
        if start >= stop:
            return np.zeros(0, dtype=np.uint8)
        first, last = start // self._block_bytes, (stop - 1) // self._block_bytes
        begin = first * self._block_bytes
        if first == last:
            return self._block(first)[start - begin : stop - begin]
        joined = np.concatenate([self._block(number) for number in range(first, last + 1)])
        return joined[start - begin : stop - begin]

    def peek(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), past the blocks: for a few bytes here and there."""
        return np.frombuffer(self._remote.fetch(start, stop), dtype=np.uint8)

    def whole(self) -> NDArray[np.uint8]:
        """Map a local copy of the whole file, which is fetched if it is not there."""
        if self.size == 0:
            return np.zeros(0, dtype=np.uint8)
        name = f"{self._remote.key}-whole"
        with self._folder.locked(name):
            found = self._folder.get(name, self.size)
            return self._folder.put(name, self._parts()) if found is None else found

    def _parts(self) -> Iterator[bytes]:
        for start in range(0, self.size, self._block_bytes):
            yield self._remote.fetch(start, min(self.size, start + self._block_bytes))

    def _begin(self) -> None:
        """Start without threads; a forked process has none, and locks in an unknown state."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[NDArray[np.uint8]]] = OrderedDict()

    def _block(self, number: int) -> NDArray[np.uint8]:
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            block = self._ask(number)
            if number == self._last + 1:  # a reader in order; any other would not want the next
                for ahead in range(number + 1, number + 1 + self._read_ahead):
                    if ahead * self._block_bytes < self.size:
                        self._ask(ahead)
            self._last = number
        return block.result()

    def _ask(self, number: int) -> "Future[NDArray[np.uint8]]":
        """Have a block fetched by a thread unless it is there; the caller holds the lock."""
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        block = self._blocks[number] = Future()
        if len(self._blocks) > _MAPPED_BLOCKS:
            self._blocks.popitem(last=False)
        # A daemon: the end of the program does not wait for a block nobody will read.
        threading.Thread(target=self._bring, args=(number, block), daemon=True).start()
        return block

    def _bring(self, number: int, block: "Future[NDArray[np.uint8]]") -> None:
        try:
            block.set_result(self._load(number))
        except BaseException as error:  # raised where the block is used
            with self._lock:  # whoever asks again has it fetched again
                if self._blocks.get(number) is block:
                    del self._blocks[number]
            block.set_exception(error)

    def _load(self, number: int) -> NDArray[np.uint8]:
        start = number * self._block_bytes
        stop = min(self.size, start + self._block_bytes)
        name = f"{self._remote.key}-{self._block_bytes}-{number}"
        found = self._folder.get(name, stop - start)
        if found is not None:
            return found
        return self._folder.put(name, iter([self._remote.fetch(start, stop)]))
