"""Files behind a URL: gateway to fsspec, which faults pass, and the tries that follow them."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fsspec

from hybrid_train.config.secrets import masked
from hybrid_train.schema.problems import UserError

_MISSING = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
_WORTH_ANOTHER_TRY = {
    HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS,
}  # fmt: skip
# What botocore raises where it finds no credentials; no other try finds some.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
TRIES, FIRST_WAIT_S = 3, 0.5  # at the start, where somebody may wait for the message
_S3_DRIVER = "; install it: pip install 'hybrid_train[s3]'"


@dataclass(frozen=True)
class Hints:
    """What the messages of one use of URLs advise.

    Attributes:
        missing: what to check where something is not there.
        driver: what else to do where a protocol needs a library.
        doing: what is done to the URL, as in "cannot read".
        done: the same, as in "may not be read".
    """

    missing: str
    driver: str
    doing: str = "read"
    done: str = "read"


def is_remote(path: str) -> bool:
    """Whether a path is a URL, and so for fsspec."""
    return "://" in path


def file_system(url: str, hints: Hints | None = None) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; fsspec keeps one for each process.

    Raises:
        UserError: if nobody knows the protocol, or its library is not installed.
    """
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        install = _S3_DRIVER if url.startswith(("s3:", "s3a:")) else ""
        other = hints.driver if hints else "or copy the files to a local folder"
        raise UserError(f"{masked(url)}: {error}{install}; {other}") from error
    except ValueError as error:
        raise UserError(f"{masked(url)}: {error}; check the first part of the address") from error
    except OSError as error:  # of drivers that connect when they are made
        raise UserError(f"{masked(url)} cannot be reached: {in_words(error)}") from error
    return files, str(path)


def content_of(url: str, hints: Hints) -> bytes:
    """Read a small file.

    Raises:
        UserError: if that is not possible, and what to do.
    """
    files, path = file_system(url, hints)
    waits = doubling(TRIES, FIRST_WAIT_S)
    return bytes(retried(url, url, lambda: files.cat_file(path), waits, hints=hints))


def cache_folder(name: str) -> Path:
    """Return the place of what is fetched once and kept, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hybrid_train" / name


def doubling(tries: int, first_wait_s: float) -> Iterator[float]:
    """Yield the seconds between tries, each twice the one before."""
    return (first_wait_s * 2**number for number in range(tries - 1))


def patient(patience_s: float, first_wait_s: float = 0.5, longest_s: float = 15) -> Iterator[float]:
    """Yield the seconds between tries until, from the first fault on, patience is over."""
    end, wait_s = time.monotonic() + patience_s, first_wait_s
    while (left_s := end - time.monotonic()) > 0:
        yield min(wait_s, left_s)
        wait_s = min(2 * wait_s, longest_s)


def retried[T](
    url: str,
    what: str,
    action: Callable[[], T],
    waits: Iterable[float],
    *,
    hints: Hints,
    told: Callable[[Exception], None] | None = None,
) -> T:
    """Do it; after a fault that may pass, wait and do it again.

    Args:
        url: that it is done to.
        what: part of the URL, for messages.
        action: what is done.
        waits: seconds before each further try.
        hints: what messages advise.
        told: called with each fault that another try follows.

    Raises:
        UserError: if no further try can help, or none is left.
    """
    tries, left = 1, iter(waits)
    while True:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # file systems have no common class of errors
            _raise_if_lasting(url, error, hints)
            wait_s = next(left, None)
            if wait_s is None:
                raise UserError(
                    f"cannot {hints.doing} {masked(what)}: {in_words(error)} ({tries} tries); "
                    "check the address and the network"
                ) from error
            if told is not None:
                told(error)
        time.sleep(wait_s)
        tries += 1


def in_words(error: Exception) -> str:
    """Return what an error says without credentials, or its name where it says nothing."""
    return masked(str(error)) or type(error).__name__


def _raise_if_lasting(url: str, error: Exception, hints: Hints) -> None:
    """Raise for what another try cannot change; return for the rest."""
    causes, shown = list(_causes(error)), masked(url)
    # An exception of an HTTP answer carries its status, whichever library it comes from.
    statuses = {s for e in causes if isinstance(s := getattr(e, "status", None), int)}
    answered = causes == [error] or any(map(_is_answer_of_s3, causes))
    if any(map(_is_missing_bucket, causes)):
        raise UserError(
            f"{shown} does not exist: there is no such bucket; {hints.missing}"
        ) from error
    if statuses & _MISSING or (answered and _is_missing(error)):
        raise UserError(f"{shown} does not exist; {hints.missing}") from error
    faults = {s for s in HTTPStatus if s.is_client_error} - _WORTH_ANOTHER_TRY
    denied = statuses & faults or isinstance(error, PermissionError)
    if denied or any(type(one).__name__ in _NO_CREDENTIALS for one in causes):
        raise UserError(
            f"{shown} may not be {hints.done}: {in_words(error)}; check the credentials"
        ) from error
    if isinstance(error, ValueError) and "range requests" in str(error):
        raise UserError(
            f"{shown}: the server cannot send parts of a file (it ignores Range); use a server "
            "that can, or copy the files to a local folder"
        ) from error


def _is_missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | IsADirectoryError)


def _is_answer_of_s3(error: BaseException) -> bool:
    """Tell whether botocore raised it for an answer of the server: then nothing was lost."""
    return isinstance(getattr(error, "response", None), dict)


def _is_missing_bucket(error: BaseException) -> bool:
    answer = getattr(error, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") == "NoSuchBucket"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # fsspec reports any fault of a request for the size as a file that is missing; the cause tells.
    while error is not None:
        yield error
        error = error.__cause__
