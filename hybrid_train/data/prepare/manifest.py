"""Token files that appear whole or not at all, and the manifest beside them."""

import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from hybrid_train import __version__
from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError

_FORMAT = "hybrid_train token files "  # and the number of the version
_LIBRARIES = ("tokenizers", "sentencepiece", "numpy", "orjson", "pyarrow")
# The .idx comes last: whoever looks for token files looks for it.
_SUFFIXES = (".bin", ".bad.jsonl", ".json", ".idx")


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer made the ids."""

    path: str  # where it was; the fingerprint tells whether it is the same
    fingerprint: str
    vocab_size: int
    end_of_document: int

    @classmethod
    def of(cls, path: str, tokenizer: AnyTokenizer) -> "TokenizerFacts":
        """Describe an open tokenizer."""
        return cls(path, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document)


@dataclass
class Counts:
    """What came of one source."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # of the documents as UTF-8
    lines: int = 0  # that were met: documents, bad lines and empty ones
    bad: int = 0
    empty: int = 0  # documents without a character, which are left out
    binary: int = 0  # files of source code that are not text, which are left out

    def add(self, other: "Counts") -> None:
        """Add what came of a part."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Manifest:
    """What is known of a pair of token files.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, ends of documents included.
        dtype: type of the ids: uint16 or int32.
        tokenizer: which made the ids; None if that is not known.
        sources: path, bytes on disk and counts of each source; prefix and counts of merged files.
        checksums: SHA-256 of the .bin and the .idx.
        versions: of Python and the libraries.
    """

    documents: int
    tokens: int
    dtype: str
    tokenizer: TokenizerFacts | None
    sources: list[dict[str, Any]]
    checksums: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Write it as JSON."""
        said = f"{_FORMAT}{formats.TOKEN_FILES.version}"
        return json.dumps({formats.KEY: said, **asdict(self)}, indent=2) + "\n"


def manifest_path(prefix: str | Path) -> Path:
    """Return where the manifest of a prefix lies."""
    return Path(f"{prefix}.json")


def library_versions() -> dict[str, str]:
    """Return the versions of what makes token files."""
    found = {"python": platform.python_version(), "hybrid_train": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that nobody installed
            found[name] = "not installed"
    return found


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest of a prefix; None where there is none.

    Raises:
        UserError: if it is no manifest, or of a version that is not read.
    """
    path = manifest_path(prefix)
    try:
        if not path.is_file():
            return None
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _require_readable(known, path)
        if known["tokenizer"] is not None:
            known["tokenizer"] = TokenizerFacts(**known["tokenizer"])
        return Manifest(**known)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no manifest of token files: {error}; remove it, or copy it again"
        ) from error


def _require_readable(known: dict[str, Any], path: Path) -> None:
    """Take the format out of what a manifest says, and refuse one that is not read.

    Raises:
        ValueError: if it is no manifest.
        UserError: if it is newer or too old.
    """
    said = str(known.pop(formats.KEY))
    number = said.removeprefix(_FORMAT)
    if not said.startswith(_FORMAT) or not number.isdecimal():
        raise ValueError(f"its format is {said!r}, not {_FORMAT + 'N'!r}")
    writer = dict(known.get("versions", {})).get("hybrid_train", "unknown")
    stamp = {**formats.TOKEN_FILES.stamp(), "version": int(number), "written_by": writer}
    formats.TOKEN_FILES.require_readable(stamp, path)


@dataclass(frozen=True)
class Progress:
    """How far a tokenization is.

    Attributes:
        bytes_read: of the sources on disk, of `total_bytes`.
        total_bytes: of all sources on disk.
        documents: so far, those of an earlier start included.
        tokens: so far, likewise.
        bad: lines without a document so far.
    """

    bytes_read: int
    total_bytes: int
    documents: int
    tokens: int
    bad: int


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


def sync_files(files: Mapping[str, IO[bytes]]) -> None:
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
