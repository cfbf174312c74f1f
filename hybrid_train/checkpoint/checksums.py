"""checksums.json in a checkpoint: size and CRC-32 of each of its files.

A disk or a network that loses or turns bits says nothing; this is how a run finds out before it
trains on from what they left.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

NAME = "checksums.json"
_PIECE_BYTES = 16 * 2**20

Sum = tuple[int, int]  # bytes, CRC-32


def of_file(path: Path) -> Sum:
    """Read a file and return its size and checksum."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return size, crc


def write(folder: Path, known: Mapping[str, Sum]) -> None:
    """Write the checksums of all files of a checkpoint.

    Args:
        folder: of the checkpoint.
        known: checksums that whoever wrote a file has found already, by name.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != NAME)
    sums = {name: known.get(name) or of_file(folder / name) for name in names}
    (folder / NAME).write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def damages(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Say what is wrong with one part of the files; nothing in a checkpoint without checksums.

    Args:
        folder: of the checkpoint.
        part: which part is looked at; parts have about the same size.
        parts: how many there are.
    """
    path = folder / NAME
    if not path.exists():
        return []
    try:
        sums = {name: (int(size), int(crc)) for name, (size, crc) in _entries(path)}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{NAME} cannot be read: {error}"]
    largest_first = sorted(sums, key=lambda name: -sums[name][0])
    return [
        found
        for name in largest_first[part::parts]
        if (found := _damage(folder / name, *sums[name]))
    ]


def is_as_written(folder: Path, name: str) -> bool:
    """Tell whether one file of a checkpoint agrees with its checksum; yes where there is none."""
    try:
        sums = dict(_entries(folder / NAME))
        return name not in sums or not _damage(folder / name, *sums[name])
    except (OSError, ValueError, TypeError, AttributeError):
        return not (folder / NAME).exists()


def _entries(path: Path) -> list[tuple[str, list[int]]]:
    return list(json.loads(path.read_text(encoding="utf-8")).items())


def _damage(path: Path, size: int, crc: int) -> str:
    """Say what is wrong with a file; nothing if it is whole."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"{path.name} has {actual:,} bytes, not {size:,}"
        return f"{path.name} has other bytes than were written" if of_file(path)[1] != crc else ""
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
