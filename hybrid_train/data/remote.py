"""Gateway to fsspec: the size, the version and byte ranges of a file behind a URL."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import fsspec

from hybrid_train.config.secrets import MASK
from hybrid_train.schema.problems import UserError

# What file systems call the things that change with the content, without case, hyphens, underscores
_VERSION_FIELDS = {
    "etag", "lastmodified", "updated", "generation", "mtime", "created",
    "md5hash", "contentmd5", "digest", "crc32c",
}  # fmt: skip
_MISSING = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
_WORTH_ANOTHER_TRY = {
    HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS,
}  # fmt: skip
_SAMPLE_BYTES = 4096


def is_remote(path: str) -> bool:
    """Whether a path is a URL, and so for fsspec."""
    return "://" in path


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
        files, path = _file_system(self.url)
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
        for number in range(self._tries):
            if number:
                time.sleep(self._first_wait_s * 2 ** (number - 1))
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # file systems have no common class of errors
                _raise_if_lasting(self.url, error)
                last = error
        shown = str(last) or type(last).__name__
        raise UserError(
            f"cannot read {what}: {shown} ({self._tries} tries); check the address and the network"
        ) from last


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; fsspec keeps one for each process."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}; or copy the files to a local folder") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; check the first part of the address") from error
    return files, str(path)


def _state_once(url: str) -> tuple[int | None, str]:
    files, path = _file_system(url)
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


def _raise_if_lasting(url: str, error: Exception) -> None:
    """Raise for what another try cannot change; return for the rest."""
    causes = list(_causes(error))
    # An exception of an HTTP answer carries its status, whichever library it comes from.
    statuses = {s for e in causes if isinstance(s := getattr(e, "status", None), int)}
    if statuses & _MISSING or (causes == [error] and _is_missing(error)):
        raise UserError(f"{url} does not exist; check the prefixes of the data section") from error
    faults = {s for s in HTTPStatus if s.is_client_error} - _WORTH_ANOTHER_TRY
    if statuses & faults or isinstance(error, PermissionError):
        raise UserError(f"{url} may not be read: {error}; check the credentials") from error
    if isinstance(error, ValueError) and "range requests" in str(error):
        raise UserError(
            f"{url}: the server cannot send parts of a file (it ignores Range); use a server that "
            "can, or copy the files to a local folder"
        ) from error


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | IsADirectoryError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # fsspec reports any fault of a request for the size as a file that is missing; the cause tells.
    while error is not None:
        yield error
        error = error.__cause__
