"""Files in a folder or behind a URL, as bytes, with a cache of blocks on disk.

The processes of a machine share the cache folder. A file in it is one block of a remote file, or
all of it where `whole` was asked for. It appears by a rename, complete or not at all; a file of
another size than it should have is fetched anew. When the folder holds more than its limit, the
files least recently opened go; whoever has one mapped keeps what is mapped.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybrid_train.config.fsspec import (
    Hints,
    cache_folder,
    doubling,
    file_system,
    is_remote,
    retried,
)
from hybrid_train.config.secrets import MASK
from hybrid_train.schema.data import Remote
from hybrid_train.schema.problems import UserError

# What file systems call the things that change with the content, without case, hyphens, underscores
_VERSION_FIELDS = {
    "etag", "lastmodified", "updated", "generation", "mtime", "created",
    "md5hash", "contentmd5", "digest", "crc32c",
}  # fmt: skip
_HINTS = Hints(
    missing="check the prefixes of the data section",
    driver="or copy the files to a local folder",
)
_SAMPLE_BYTES = 4096
_MAPPED_BLOCKS = 64  # of each remote file in this process: address space, not memory


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


class CachedFile:
    """A remote file that is read through a cache folder; safe to use from several threads.

    Raises:
        UserError: as `RemoteFile` and `CacheFolder`.
    """

    def __init__(self, url: str, settings: Remote) -> None:
        self._remote = RemoteFile(url, tries=settings.tries, first_wait_s=settings.first_wait_s)
        folder = Path(settings.cache).expanduser() if settings.cache else cache_folder("remote")
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


class RemoteFile:
    """One file behind a URL, as it was when it was opened; any change after that is an error.

    Attributes:
        url: for messages.
        size: in bytes.
        key: names this version of this file; another version has another key. Made from the URL,
            the size and what the server says of the version (ETag, time of the last change); from
            a sample of the content if the server says nothing.

    Raises:
        UserError: names the URL: the file does not exist, its protocol needs a library, it cannot
            be reached in `tries` tries, or the server does not say its size.
    """

    def __init__(self, url: str, *, tries: int, first_wait_s: float) -> None:
        if MASK in url:
            raise UserError(
                f"{url}: a run folder holds no credentials, so they are missing here; give the "
                "whole address on the command line, or better none with a password in it"
            )
        self.url = url
        self._tries = tries
        self._first_wait_s = first_wait_s
        size, self._version = self._state()
        if size is None:
            raise UserError(
                f"{url}: the server does not say how large the file is, so it cannot be read in "
                "parts; copy the files to a local folder"
            )
        self.size = size
        version = self._version or self._sample()
        self.key = hashlib.sha256(f"{url} {size} {version}".encode()).hexdigest()[:24]

    def fetch(self, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop) over the network.

        Raises:
            UserError: as the class, or if the file has changed or the server cannot send parts.
        """
        if start >= stop:
            return b""
        what = f"bytes {start} to {stop} of {self.url}"
        return self._retry(what, lambda: self._fetch_once(start, stop))

    def _fetch_once(self, start: int, stop: int) -> bytes:
        files, path = file_system(self.url)
        data = _read_range(files, path, start, stop, self.size)
        # Asked after the read: then the bytes are of the version that was opened.
        size, version = _state_once(self.url)
        if (size, version) != (self.size, self._version):
            raise UserError(
                f"{self.url} has changed since it was opened ({self.size} bytes then, {size} now); "
                "start again when whoever writes it is done"
            )
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    def _state(self) -> tuple[int | None, str]:
        return self._retry(self.url, lambda: _state_once(self.url))

    def _sample(self) -> str:
        starts = {0, max(0, self.size // 2), max(0, self.size - _SAMPLE_BYTES)}
        digest = hashlib.sha256()
        for start in sorted(starts):
            digest.update(self.fetch(start, min(self.size, start + _SAMPLE_BYTES)))
        return digest.hexdigest()

    def _retry[T](self, what: str, action: Callable[[], T]) -> T:
        """Do it; after a fault that may pass, wait and do it again, `tries` times in all."""
        waits = doubling(self._tries, self._first_wait_s)
        return retried(self.url, what, action, waits, hints=_HINTS)


def _state_once(url: str) -> tuple[int | None, str]:
    files, path = file_system(url)
    files.invalidate_cache(path)  # some keep listings, which would hide a change
    info: Mapping[str, Any] = files.info(path)
    if info.get("type") == "directory":
        raise FileNotFoundError(url)
    fields = {name.lower().replace("-", "").replace("_", ""): info[name] for name in info}
    known = sorted(_VERSION_FIELDS & fields.keys())
    size = info.get("size")
    return size, " ".join(f"{name}={fields[name]}" for name in known if fields[name])


def _read_range(files: Any, path: str, start: int, stop: int, size: int) -> bytes:
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if not protocols & {"http", "https"}:
        return bytes(files.cat_file(path, start=start, end=stop))
    # Of fsspec 2026.9.0's two ways over HTTP, cat_file reads the whole file if the server ignores
    # the range; a file object looks at the answer first.
    options = {"block_size": stop - start, "cache_type": "none", "size": size}
    # Compressed, a range would be one of the compressed bytes.
    plain = {"Accept-Encoding": "identity"}
    with files.open(path, headers=plain, **options) as file:
        file.seek(start)
        return bytes(file.read(stop - start))
