"""Inputs to sources: what files, globs and folders name, in a fixed order, and what they hold."""

import enum
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_train.config.names import nearest
from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.prepare import Format


class Compression(enum.Enum):
    """How a file is packed."""

    none = ""
    gzip = ".gz"
    zstd = ".zst"


@dataclass(frozen=True)
class Source:
    """One input file; or a folder of source code, whose files are documents.

    Attributes:
        path: as the user named it, or as it was found.
        format: anything but `auto`.
        compression: of the file.
        size: bytes on disk.
        stamp: changes when the files do.
        files: of a folder, with their sizes; empty for a file.
    """

    path: str
    format: Format
    compression: Compression
    size: int
    stamp: int
    files: tuple[tuple[str, int], ...] = ()


_BY_NAME = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,
    ".parquet": Format.parquet,
    ".txt": Format.text,
}
_log = logging.getLogger(__name__)
_SHARDS = (".jsonl", ".ndjson", ".parquet")  # a folder with any of them is one of shards


def find_sources(inputs: Sequence[str], asked: Format, suffixes: Sequence[str]) -> list[Source]:
    """Return the sources of all inputs: inputs as given, files of a folder or glob by name.

    Args:
        inputs: files, globs and folders.
        asked: format of every file; `auto` goes by names.
        suffixes: of folders, only files with these; all if empty.

    Raises:
        UserError: if an input is not there, is named twice or holds nothing.
    """
    found = [source for name in inputs for source in _of_input(name, asked, suffixes)]
    seen: set[str] = set()
    for source in found:
        real = os.path.realpath(source.path)
        if real in seen:
            raise UserError(f"{source.path} is named twice by input; its text would count twice")
        seen.add(real)
    return found


def _of_input(name: str, asked: Format, suffixes: Sequence[str]) -> Iterator[Source]:
    path = Path(name)
    if path.is_dir():
        yield from _of_folder(path, asked, suffixes)
    elif path.exists():
        yield _file(path, asked)
    else:
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            near = nearest(name, map(str, path.parent.glob("*"))) if path.parent.is_dir() else None
            hint = f"; did you mean {near}?" if near else ""
            raise UserError(f"input={name}: there is no such file, folder or match{hint}")
        for match in matches:
            yield from _of_input(match, asked, suffixes)


def _of_folder(folder: Path, asked: Format, suffixes: Sequence[str]) -> Iterator[Source]:
    files = list(_files_below(folder, suffixes))
    if not files:
        only = f" with {', '.join(suffixes)}" if suffixes else ""
        raise UserError(f"input={folder}: there is no file{only} below this folder")
    shards = [path for path in files if _kind(path)[0] in _SHARDS]
    if asked is Format.code or (asked is Format.auto and not shards):
        listed = [(str(path), path.stat()) for path in files]
        yield Source(
            path=str(folder),
            format=Format.code,
            compression=Compression.none,
            size=sum(stat.st_size for _, stat in listed),
            stamp=max(stat.st_mtime_ns for _, stat in listed),
            files=tuple((path, stat.st_size) for path, stat in listed),
        )
        return
    if asked is Format.auto and len(shards) < len(files):
        _log.info("%s: %d other files are not read", folder, len(files) - len(shards))
    for path in shards if asked is Format.auto else files:
        yield _file(path, asked)


def _files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield the files of a folder by name; nothing hidden, no links, which may go in circles."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            hidden = name.startswith(".") or path.is_symlink() or not path.is_file()
            if not hidden and (not suffixes or name.endswith(tuple(suffixes))):
                yield path


def _file(path: Path, asked: Format) -> Source:
    kind, compression = _kind(path)
    format_ = _BY_NAME.get(kind, Format.code) if asked is Format.auto else asked
    stat = path.stat()
    if format_ is Format.parquet and compression is not Compression.none:
        raise UserError(f"{path}: Parquet compresses its own columns; unpack the file first")
    is_document = format_ in (Format.code, Format.text)
    return Source(
        path=str(path),
        format=format_,
        compression=compression,
        size=stat.st_size,
        stamp=stat.st_mtime_ns,
        files=((str(path), stat.st_size),) if is_document else (),
    )


def _kind(path: Path) -> tuple[str, Compression]:
    """Return the suffix that tells the format, and the compression behind it."""
    packed = next((one for one in Compression if one.value and path.name.endswith(one.value)), None)
    if packed is None:
        return path.suffix, Compression.none
    return Path(path.stem).suffix, packed
