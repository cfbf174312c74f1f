"""Inputs of a data command: the files that names, globs and folders stand for, what they hold."""

import errno
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from hybrid_train.data.prepare.file_kinds import (
    Compression,
    Kind,
    by_content,
    by_name,
    require_known_packing,
)
from hybrid_train.schema.names import in_quotes, nearest
from hybrid_train.schema.prepare import Format
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_PART_OF_CODE = (".json", ".txt")  # suffixes that do not make a folder one of data
_log = logging.getLogger(__name__)


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


def find_sources(inputs: Sequence[str], asked: Format, suffixes: Sequence[str]) -> list[Source]:
    """Return the sources of all inputs: inputs as given, files of a folder or glob by name.

    Args:
        inputs: files, globs and folders; a file that links lead to as well counts once.
        asked: format of every file; `auto` goes by names, and by content where these say nothing.
        suffixes: of folders, only files with these; all if empty. Capitals do not matter.

    Raises:
        UserError: if an input is not there, cannot be read, is named twice or holds nothing, or if
            nobody can tell what its files are.
    """
    found: list[Source] = []
    named_by: dict[str, int] = {}  # number of an input, by the real path of each of its files
    for number, name in enumerate(inputs):
        try:
            for source in _of_input(name, asked, suffixes):
                kept = _not_seen(source, number, named_by)
                found += [kept] if kept is not None else []
        except PermissionError as error:
            raise UserError(
                f"input={name}: {error.filename} may not be read: permission denied"
            ) from error
    return found


def _not_seen(source: Source, number: int, named_by: dict[str, int]) -> Source | None:
    """Return a source without the files that this input has named before; None if none is left."""
    files = source.files or ((source.path, source.size),)
    kept = []
    for path, size in files:
        real = real_path(path)
        if named_by.get(real, number) != number:
            raise UserError(f"{path} is named twice by input; its text would count twice")
        if real not in named_by:
            if not os.access(path, os.R_OK, effective_ids=True):  # now, not hours later
                raise PermissionError(errno.EACCES, "permission denied", path)
            kept.append((path, size))
            named_by[real] = number
    if len(kept) == len(files):
        return source
    if not source.files or not kept:
        return None
    return replace(source, files=tuple(kept), size=sum(size for _, size in kept))


def _of_input(name: str, asked: Format, suffixes: Sequence[str]) -> Iterator[Source]:
    found = [name] if os.path.lexists(name) else matching_paths(name)
    if not found:
        raise nothing_named(name)
    paths = [Path(one) for one in found]
    files = each_once([path for path in paths if not path.is_dir()])
    for path in files:
        if leads_nowhere(path):
            raise _dead_link(name, path)
        if not path.is_file():
            raise UserError(
                f"input={name}: {path} is a pipe or a device; write its content to a file first"
            )
    kinds = _kinds(name, files, asked)
    for path in paths:
        if path.is_dir():
            yield from _of_folder(path, asked, suffixes)
        elif path in kinds:
            require_known_packing(kinds[path], path)
            yield _file_source(path, kinds[path])


def _of_folder(folder: Path, asked: Format, suffixes: Sequence[str]) -> Iterator[Source]:
    endings = tuple(suffix.lower() for suffix in suffixes)
    files = [
        path for path in files_below(folder) if not endings or path.name.lower().endswith(endings)
    ]
    files = _without_dead_links(folder, files)
    if not files:
        only = f" with {', '.join(suffixes)}" if suffixes else ""
        raise UserError(f"input={folder}: there is no file{only} below this folder")
    if asked is Format.auto and (shards := each_once([path for path in files if _is_shard(path)])):
        read = {real_path(str(path)) for path in shards}
        if others := [path for path in files if real_path(str(path)) not in read]:
            _log.warning("%s: %d other files are not read: %s, ...", folder, len(others), others[0])
        files = shards
    files = each_once(files)
    if asked is Format.code:
        yield _code_source(folder, files)
        return
    kinds = _kinds(str(folder), files, asked, is_folder=True)
    if all(kind.format is Format.code for kind in kinds.values()):
        yield _code_source(folder, files)
        return
    for path, kind in kinds.items():
        yield _file_source(path, kind)


def _without_dead_links(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Leave out links that lead nowhere; refuse one by whose name there should be data."""
    dead = [path for path in files if leads_nowhere(path)]
    for path in dead:
        if by_name(path).format is not None:
            raise _dead_link(str(folder), path)
    if dead:
        _log.warning("%s: %d dead links are left out: %s, ...", folder, len(dead), dead[0])
    return [path for path in files if path not in dead] if dead else list(files)


def _dead_link(name: str, path: Path) -> UserError:
    return UserError(
        f"input={name}: {path} is a link to {path.readlink()}, which is not there; bring it back, "
        "or remove the link"
    )


def _is_shard(path: Path) -> bool:
    """Tell whether a file of a folder holds documents of its own; JSON is part of source code."""
    kind = by_name(path)
    is_plain = kind.compression is Compression.none
    return kind.format is not None and not (is_plain and path.suffix.lower() in _PART_OF_CODE)


def _kinds(
    name: str, files: Sequence[Path], asked: Format, *, is_folder: bool = False
) -> Mapping[Path, Kind]:
    """Say what each of the files of an input holds: as asked, by name, or by content."""
    kinds = {path: by_name(path) for path in files}
    if asked is not Format.auto:
        packed = {path: by_content(path) for path in files if kinds[path].format is None}
        return {path: replace(kind, format=asked) for path, kind in {**kinds, **packed}.items()}
    unknown = [
        path
        for path, kind in kinds.items()
        if kind.format is None or (is_folder and not _is_shard(path))
    ]
    return {**kinds, **_by_content(name, unknown)}


def _by_content(name: str, files: Sequence[Path]) -> dict[Path, Kind]:
    """Decide together on files whose names say nothing, so that none is taken for another kind.

    Raises:
        UserError: if most, but not all, hold JSON lines or Parquet.
    """
    kinds = dict.fromkeys(files, Kind(Format.code, Compression.none)) | _looked_at(files)
    filled = [path for path, kind in kinds.items() if not kind.is_empty]
    known = [path for path in filled if kinds[path].format is not Format.code]
    if known and len(known) == len(filled):
        _log.info(
            "%s: %s of an unknown suffix: read as %s, which the content is; with format=text each "
            "is one document", name, counted(len(known), "file"), _held(kinds[known[0]]),
        )  # fmt: skip
        empty = replace(kinds[known[0]], compression=Compression.none)  # such as _SUCCESS
        return {path: empty if kind.is_empty else kind for path, kind in kinds.items()}
    sure = [path for path in known if kinds[path].json_lines != 1]  # one line may be anything
    if sure:
        what = f"{name}: {len(sure)} of {len(filled)} files hold {_held(kinds[sure[0]])}"
        other = next(path for path in filled if path not in sure)
        if 2 * len(sure) > len(filled):
            raise UserError(
                f"input={what} by their content, for one {sure[0]}, and others do not, for one "
                f"{other}; name those that should be read, or say what all are: format=jsonl"
            )
        _log.warning("%s, for one %s, and are read as source code like the rest", what, sure[0])
    return {path: replace(kind, format=Format.code) for path, kind in kinds.items()}


def _held(kind: Kind) -> str:
    return "Parquet" if kind.format is Format.parquet else "lines of JSON objects"


def _looked_at(files: Iterable[Path]) -> dict[Path, Kind]:
    """Look into files; of those whose suffix is a word, which may name a language, into one."""
    found: dict[Path, Kind] = {}
    languages = {".txt"}
    for path in files:
        suffix = path.suffix.lower()
        if suffix in languages:
            continue
        kind = by_content(path)
        if kind.format is None:
            kind = replace(kind, format=Format.code)
            if suffix[1:].isalpha() and suffix != ".json" and not kind.is_empty:
                languages.add(suffix)
        found[path] = kind
    return found


def _code_source(folder: Path, files: Sequence[Path]) -> Source:
    listed = [(str(path), path.stat()) for path in files]
    return Source(
        path=str(folder),
        format=Format.code,
        compression=Compression.none,
        size=sum(stat.st_size for _, stat in listed),
        stamp=max(stat.st_mtime_ns for _, stat in listed),
        files=tuple((path, stat.st_size) for path, stat in listed),
    )


def _file_source(path: Path, kind: Kind) -> Source:
    assert kind.format is not None, "every kind was decided"
    if kind.format is Format.parquet and kind.compression is not Compression.none:
        raise UserError(f"{path}: Parquet compresses its own columns; unpack the file first")
    stat = path.stat()
    is_document = kind.format in (Format.code, Format.text)
    return Source(
        path=str(path),
        format=kind.format,
        compression=kind.compression,
        size=stat.st_size,
        stamp=stat.st_mtime_ns,
        files=((str(path), stat.st_size),) if is_document else (),
    )


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes of all inputs: inputs as given, matches and files of a folder by name.

    Of one input, files that links lead to as well count once.

    Raises:
        UserError: if an input names nothing, or what another one has named.
    """
    found: list[str] = []
    for name in inputs:
        of_input = _prefixes_of(name)
        both = [Path(f"{prefix}.idx") for prefix in (*found, *of_input)]
        if len(each_once(both)) < len(both):
            raise UserError(f"input={name} names token files that are named before; once is enough")
        found += of_input
    return found


def _prefixes_of(name: str) -> list[str]:
    plain = name.removesuffix(".idx").removesuffix(".bin")
    if os.path.isfile(f"{plain}.idx") or os.path.isfile(f"{plain}.bin"):
        return [plain]
    is_folder = os.path.isdir(name)
    pattern = str(Path(glob.escape(name), "*.idx")) if is_folder else f"{plain}.idx"
    found = each_once(list(map(Path, matching_paths(pattern))))
    if not found:
        raise nothing_named(name, f"no {pattern if is_folder else plain + '.idx'}", ".idx")
    return [str(path).removesuffix(".idx") for path in found]


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder by name, links that lead nowhere among them; nothing hidden.

    A folder that links lead to comes behind the others, once, so that links may go in circles.

    Raises:
        UserError: if a folder may not be read.
    """
    seen: set[str] = set()
    waiting = [folder]
    for start in waiting:
        if os.path.realpath(start) in seen:
            continue
        for place, folders, names in os.walk(start, onerror=_unreadable):
            seen.add(os.path.realpath(place))
            below = [Path(place, name) for name in _visible(folders)]
            waiting += [one for one in below if one.is_symlink()]
            folders[:] = [
                one.name
                for one in below
                if not one.is_symlink() and os.path.realpath(one) not in seen
            ]
            for path in (Path(place, name) for name in _visible(names)):
                if path.is_file() or leads_nowhere(path):
                    yield path


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    """Refuse what `os.walk` would leave out without a word."""
    raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def leads_nowhere(path: Path) -> bool:
    """Tell whether a path is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def matching_paths(pattern: str) -> list[str]:
    """Return what a pattern with *, ? and [] matches, by name; ** stands for any folders."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    # glob.glob 3.12 goes through circles of links until their names are too long, all ways there.
    cut = parts.index("**")
    found = []
    for start in glob.glob(str(Path(*parts[:cut]))) if cut else ["."]:
        below = set(files_below(Path(start))) if Path(start).is_dir() else set()
        places = below | {folder for path in below for folder in path.parents}
        found += [
            str(path)
            for path in places
            if path.is_relative_to(start)
            and _fits(path.relative_to(start).parts, parts[cut:])
            and (parts[-1] != "**" or path in below)
        ]
    return sorted(found)


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_fits(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def nothing_named(
    name: str, what: str = "no such file, folder or match", suffix: str = ""
) -> UserError:
    """Say what an input names that is not there, and which file of this suffix it may mean."""
    parent = next(folder for folder in Path(name).parents if os.path.isdir(folder))
    if not os.access(parent, os.R_OK | os.X_OK, effective_ids=True):
        return UserError(f"input={name}: the folder {parent} may not be read: permission denied")
    near = nearest(name, (str(one).removesuffix(suffix) for one in parent.glob(f"*{suffix}")))
    hint = f"; did you mean {near}?" if near else ""
    if near and "," in near:
        hint = f"; did you mean {near}? A name with a comma needs quotes: input={in_quotes(near)}"
    return UserError(f"input={name}: there is {what}{hint}")


def real_path(path: str) -> str:
    """Return the name that a file has without any link."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


@lru_cache(maxsize=1024)  # files of a folder follow each other
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def each_once(paths: Sequence[Path]) -> list[Path]:
    """Keep one name of each file: that of the file itself if it is there, else the first link."""
    kept: dict[str, Path] = {}
    for path in paths:
        real = real_path(str(path))
        if real not in kept or (kept[real].is_symlink() and not path.is_symlink()):
            kept[real] = path
    chosen = set(kept.values())
    return [path for path in dict.fromkeys(paths) if path in chosen]
