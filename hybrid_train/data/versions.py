"""Which files a job would read, and what they hold now: so that other data makes another result."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from hybrid_train.data import quickstart
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.limits import FILE
from hybrid_train.schema.names import listed_paths
from hybrid_train.schema.prepare import DataJob

_READ_WHOLE = 2**24  # bytes; of a larger file the size and both ends stand for the rest
_END = 2**20
_OF_A_RUN = ("config.yaml", "checkpoints")  # what can be read of a run folder; the rest grows


def versions_of(
    schema: type[Any], sections: dict[str, Any], left_out: Sequence[str] = ()
) -> dict[str, object]:
    """Describe every file and folder that a job names and that exists, by the setting and its name.

    Args:
        schema: dataclass of the job.
        sections: its values by name; sections as dataclasses.
        left_out: settings that are not looked at.
    """
    hints = get_type_hints(schema, include_extras=True)
    found: dict[str, object] = {}
    for name, value in sections.items():
        if isinstance(value, Quickstart):
            found[name] = quickstart.versions(value)
            continue
        named = list(file_names(hints[name], value, name))
        if name == "input" and issubclass(schema, DataJob):
            named += [(name, path) for path in listed_paths(value)]
        found |= {
            f"{path} {file}": _version(file)
            for path, file in named
            if not path.startswith(tuple(left_out))
        }
    return {path: version for path, version in found.items() if version is not None}


def file_names(kind: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield setting and value of all that a type says is the name of a file or a folder."""
    inner = get_args(kind)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            yield from file_names(
                hints[field.name], getattr(value, field.name), f"{path}.{field.name}"
            )
    elif get_origin(kind) is Annotated:
        if FILE in kind.__metadata__ and isinstance(value, str):
            yield path, value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from file_names(inner[-1], part, path)
    elif value is not None:
        for part_kind in inner:
            yield from file_names(part_kind, value, path)


def _version(name: str) -> object | None:
    """Describe a file, a pair of token files, or a folder; None where there is no such thing."""
    path = Path(name)
    index = Path(f"{name}.idx")
    try:
        if index.is_file():
            return [_of_file(index), Path(f"{name}.bin").stat().st_size]
        if path.is_file():
            return _of_file(path)
        if path.is_dir():
            return _of_folder(path)
    except OSError:
        return None  # whoever opens it says what is wrong
    return None


def _of_folder(folder: Path) -> dict[str, str]:
    is_run = (folder / _OF_A_RUN[0]).is_file() and (folder / _OF_A_RUN[1]).is_dir()
    places = [folder / name for name in _OF_A_RUN] if is_run else [folder]
    files = [place for place in places if place.is_file()]
    files += [file for place in places for file in place.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): _of_file(file) for file in sorted(files)}


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _READ_WHOLE:
            digest.update(file.read())
        else:
            digest.update(file.read(_END))
            file.seek(size - _END)
            digest.update(file.read())
    return digest.hexdigest()
