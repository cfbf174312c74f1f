"""Where the checkpoints of a run stand, which of them are whole and sound, and which are to go.

    RUN/config.yaml  RUN/tokenizer/  RUN/checkpoints/step_00000500/{position.json, ...}

A checkpoint is written under a name that ends in `.partial` and renamed when it is whole, so a
folder with a final name is always complete. checksums.json in it has size and CRC-32 of each of its
files: a disk or a network that loses or turns bits says nothing, and this is how a run finds out
before it trains on from what they left.
"""

import contextlib
import hashlib
import json
import operator
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError

FOLDER = "checkpoints"
POSITION = "position.json"
BATCHES = "batches"  # plain data in the position
_POSITION_KEYS = ("step", "tokens", "source_tokens", BATCHES)
TOKENIZER = "tokenizer"  # folder of a run that holds a copy of its tokenizer
CHECKSUMS = "checksums.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"
_NAME = re.compile(r"step_(\d{8,})")
_BLOCK_BYTES = 16 * 2**20
Sum = tuple[int, int]  # bytes, CRC-32


@dataclass(frozen=True)
class Found:
    """One complete checkpoint."""

    path: Path
    step: int

    @property
    def run_dir(self) -> Path:
        """The run folder it belongs to."""
        return self.path.parent.parent

    def position(self) -> dict[str, Any]:
        """Read the position of the run: step, tokens, tokens of each source.

        And what the source of its batches keeps, under `BATCHES`, where it keeps something.

        Raises:
            UserError: if the file is damaged, or the checkpoint of a format that is not read.
        """
        path = self.path / POSITION
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            formats.CHECKPOINT.require_readable(found.pop(formats.KEY, None), self.path)
            if strange := sorted(found.keys() - set(_POSITION_KEYS)):
                raise UserError(
                    f"{path} holds {', '.join(strange)}, as before 25 November 2026: checkpoints "
                    f"of then are not read; {formats.CHECKPOINT.too_old}"
                )
            return {
                name: dict(value) if name == BATCHES else _numbers(value)
                for name, value in found.items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); use an older checkpoint of the run"
            ) from error

    def require_readable(self) -> None:
        """Refuse a format that is not read; a damaged file says nothing, its checksum will.

        Raises:
            UserError: if it is newer or too old.
        """
        if not is_as_written(self.path, POSITION):
            return
        with contextlib.suppress(ValueError, AttributeError):
            found = json.loads((self.path / POSITION).read_text(encoding="utf-8"))
            formats.CHECKPOINT.require_readable(found.get(formats.KEY), self.path)


def _numbers(value: object) -> int | dict[str, int]:
    """Return a whole number, or several by name.

    Raises:
        TypeError: if it is something else.
    """
    if isinstance(value, dict):
        return {str(name): operator.index(number) for name, number in value.items()}
    return operator.index(value)  # type: ignore[arg-type]  # it raises what is caught


def path_of(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run_dir / FOLDER / f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a folder of this name; None if it is none of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def complete(run_dir: Path) -> list[Found]:
    """List the complete checkpoints of a run, oldest first."""
    found = [_complete_at(path) for path in (run_dir / FOLDER).glob("step_*")]
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def latest(run_dir: Path) -> Found | None:
    """Return the newest complete checkpoint of a run."""
    return max(complete(run_dir), key=lambda one: one.step, default=None)


def locate(path: Path) -> Found:
    """Find the checkpoint that the user means by a run folder or a checkpoint of it.

    Raises:
        UserError: if there is none, or one of a format that is not read; says what stands there.
    """
    one = _complete_at(path.absolute())
    newest = one or latest(path.absolute())
    if newest is not None:
        newest.require_readable()
        return newest
    if not path.exists():
        raise UserError(
            f"no checkpoint: {path} does not exist; give a run folder or one of its "
            f"{FOLDER}/step_* folders"
        )
    if path.name.endswith(PARTIAL):
        raise UserError(f"{path} was never finished; give another of {path.parent}/step_*")
    raise UserError(
        f"no checkpoint in {path}: neither a complete step_* folder nor a run folder with one "
        f"under {FOLDER}/"
    )


def _complete_at(path: Path) -> Found | None:
    step = step_of(path.name)
    return Found(path, step) if step is not None and (path / POSITION).is_file() else None


def set_aside(found: Found) -> Path:
    """Give a damaged checkpoint a name under which no run takes it for one; return its place."""
    place = found.path.with_name(found.path.name + DAMAGED)
    if place.exists():
        shutil.rmtree(place)
    return found.path.rename(place)


def keep_newest(run_dir: Path, count: int, spared: int | None = None) -> None:
    """Delete all complete checkpoints but the newest `count`, and that of the step to be spared."""
    for old in (one for one in complete(run_dir)[:-count] if one.step != spared):
        # A deletion that is cut off must not leave a folder that looks whole.
        shutil.rmtree(old.path.rename(old.path.with_name(old.path.name + PARTIAL)))


def drop_partial(run_dir: Path) -> list[Path]:
    """Delete what interrupted saves and deletions left behind, and return it for the log."""
    leftovers = sorted((run_dir / FOLDER).glob(f"*{PARTIAL}"))
    for folder in leftovers:
        shutil.rmtree(folder)
    return leftovers


def write_position(folder: Path, position: Mapping[str, Any]) -> None:
    """Write the position of the run into a checkpoint, with the format that it has."""
    whole = {formats.KEY: formats.CHECKPOINT.stamp(), **position}
    (folder / POSITION).write_text(json.dumps(whole) + "\n", encoding="utf-8")


def sync(folder: Path) -> None:
    """Have the disk hold the files of a folder and their names, before anything relies on them."""
    for path in (*(one for one in folder.iterdir() if one.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sum_of_file(path: Path) -> Sum:
    """Read a file and return its size and checksum."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def write_checksums(folder: Path, known: Mapping[str, Sum]) -> None:
    """Write the checksums of all files of a checkpoint.

    Args:
        folder: of the checkpoint.
        known: checksums that whoever wrote a file has found already, by name.
    """
    names = sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS
    )
    sums = {name: known.get(name) or sum_of_file(folder / name) for name in names}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=0) + "\n", encoding="utf-8")


def digest_of(checkpoint: Path) -> str:
    """Return a digest of the checksums of a checkpoint, or of names and sizes of its files."""
    sums = checkpoint / CHECKSUMS
    if sums.is_file():
        return hashlib.sha256(sums.read_bytes()).hexdigest()
    sizes = [(one.name, one.stat().st_size) for one in sorted(checkpoint.iterdir())]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()


def damages(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Say what is wrong with one part of the files; nothing in a checkpoint without checksums.

    Args:
        folder: of the checkpoint.
        part: which part is looked at; parts have about the same size.
        parts: how many there are.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return []
    try:
        sums = {name: (int(size), int(crc)) for name, (size, crc) in _checksums_in(path)}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read: {error}"]
    largest_first = sorted(sums, key=lambda name: -sums[name][0])
    return [
        found
        for name in largest_first[part::parts]
        if (found := _damage(folder / name, *sums[name]))
    ]


def is_as_written(folder: Path, name: str) -> bool:
    """Tell whether one file of a checkpoint agrees with its checksum; yes where there is none."""
    try:
        sums = dict(_checksums_in(folder / CHECKSUMS))
        return name not in sums or not _damage(folder / name, *sums[name])
    except (OSError, ValueError, TypeError, AttributeError):
        return not (folder / CHECKSUMS).exists()


def _checksums_in(path: Path) -> list[tuple[str, list[int]]]:
    return list(json.loads(path.read_text(encoding="utf-8")).items())


def _damage(path: Path, size: int, crc: int) -> str:
    """Say what is wrong with a file; nothing if it is whole."""
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"{path.name} has {actual:,} bytes, not {size:,}"
        return (
            f"{path.name} has other bytes than were written" if sum_of_file(path)[1] != crc else ""
        )
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
