"""What a tokenization has written, and up to where: a killed one goes on from there.

By hand since a file for each block and a merge, the simpler way to the same, takes 3.3 times as
long and twice the disk (`tests/benchmarks/by_library.py blocks`, docs/measured.md).

The position is saved after the data it speaks of has reached the disk. Whatever lies behind the
saved sizes is cut off when the job goes on, so no document is lost and none is there twice.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from hybrid_train.data.prepare.blocks import BadLine
from hybrid_train.data.prepare.manifest import Counts, Output, sync_files, write_whole
from hybrid_train.schema import formats
from hybrid_train.schema.problems import UserError

_STATE = "state.json"
_FILES = (".bin", ".lengths", ".bad.jsonl")
_READ_BYTES = 2**23


@dataclass
class _State:
    """What state.json holds."""

    command: dict[str, Any]  # what the output depends on
    position: list[int]  # source, and block within it, to do next
    sizes: dict[str, int]  # bytes of each file that count
    last_lines: list[int]  # lines of each source so far, blank ones included
    counts: list[Counts]
    is_complete: bool = False


@dataclass(frozen=True)
class Part:
    """What came of one block."""

    ids: bytes
    lengths: bytes  # int32
    bad: list[BadLine]
    last_line: int  # number of its last line, blank ones included
    counts: Counts


class Journal:
    """Appends parts in their order; a context that closes its files.

    Args:
        output: locked.
        command: what the output depends on; another command cannot go on from here.
        num_sources: number of sources.
        overwrite: whether what another command left is thrown away; what holds no document
            always is.
        interval_s: seconds between saves.

    Raises:
        UserError: if the folder belongs to another command.
    """

    def __init__(
        self, output: Output, command: Mapping[str, Any], num_sources: int,
        *, overwrite: bool, interval_s: float,
    ) -> None:  # fmt: skip
        self._output = output
        self._interval_s = interval_s
        self._saved_at = time.monotonic()
        state = _read_state(output)
        if state is not None and state.command != command:
            if not overwrite and any(one.documents for one in state.counts):
                raise UserError(_belongs_to_another(output, state.command, command))
            state = None
        self.goes_on = state is not None
        self._state = state or _State(
            dict(command), [0, 0], dict.fromkeys(_FILES, 0), [0] * num_sources,
            [Counts() for _ in range(num_sources)],
        )  # fmt: skip
        self._total = Counts()
        for one in self._state.counts:
            self._total.add(one)
        self._digest = hashlib.sha256()
        self._files: dict[str, IO[bytes]] = {}

    def _open(self) -> None:
        """Open the files and cut off what the state does not speak of."""
        for suffix in _FILES:
            path = self._output.path(suffix)
            file = path.open("r+b" if self.goes_on and path.exists() else "w+b")
            self._files[suffix] = file
            size = self._state.sizes[suffix]
            length = file.seek(0, os.SEEK_END)
            if length < size:
                raise UserError(
                    f"{path} is shorter than its position says: it was changed from outside; "
                    f"remove {self._output.folder} and start again"
                )
            if length > size:
                file.truncate(size)
            file.seek(0)
            if suffix == ".bin":
                for start in range(0, size, _READ_BYTES):
                    self._digest.update(file.read(min(_READ_BYTES, size - start)))
            file.seek(size)
        self.save()

    @staticmethod
    def is_there(output: Output) -> bool:
        """Tell whether a tokenization has begun to write here."""
        return (output.folder / _STATE).exists()

    def __enter__(self) -> "Journal":
        if not self.is_complete:
            try:
                self._open()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def is_complete(self) -> bool:
        """Whether all is written, and only the files have to be moved to their place."""
        return self._state.is_complete

    @property
    def position(self) -> tuple[int, int]:
        """Source, and block within it, to do next."""
        return self._state.position[0], self._state.position[1]

    @property
    def counts(self) -> list[Counts]:
        """What came of each source so far."""
        return self._state.counts

    @property
    def total(self) -> Counts:
        """What came of all sources so far."""
        return self._total

    @property
    def bad_path(self) -> Path:
        """Where bad lines are written aside."""
        return self._output.path(".bad.jsonl")

    @property
    def bin_checksum(self) -> str:
        """SHA-256 of the ids so far."""
        return self._digest.hexdigest()

    @property
    def first_bad(self) -> BadLine | None:
        """The first bad line, as an example."""
        sync_files(self._files)
        with self._output.path(".bad.jsonl").open("rb") as file:
            line = file.readline()
        return BadLine(**orjson.loads(line)) if line else None

    def append(self, source: int, number: int, part: Part) -> None:
        """Write what came of a block of a source, and save the position from time to time."""
        bad = b"".join(map(_line, self._placed(source, part.bad)))
        contents = dict(zip(_FILES, (part.ids, part.lengths, bad), strict=True))
        for suffix, content in contents.items():
            self._files[suffix].write(content)
        self._digest.update(part.ids)
        # Only now: what is written in part is cut off when the job goes on.
        for suffix, content in contents.items():
            self._state.sizes[suffix] += len(content)
        self._state.position = [source, number + 1]
        self._state.last_lines[source] += part.last_line
        self._state.counts[source].add(part.counts)
        self._total.add(part.counts)
        if time.monotonic() - self._saved_at >= self._interval_s:
            self.save()

    def _placed(self, source: int, bad: Iterable[BadLine]) -> Iterator[BadLine]:
        """Number lines within their source, not within their block."""
        before = self._state.last_lines[source]
        return (dataclasses.replace(one, line=before + one.line) for one in bad)

    def save(self) -> None:
        """Bring everything to the disk, then the position."""
        sync_files(self._files)
        text = json.dumps({formats.KEY: formats.TOKENIZATION.stamp(), **asdict(self._state)})
        write_whole(self._output.folder / _STATE, text)
        self._saved_at = time.monotonic()

    def lengths(self) -> NDArray[np.int32]:
        """Map the lengths of all documents; there must be one at least."""
        sync_files(self._files)
        path = self._output.path(".lengths")
        return np.memmap(path, "<i4", mode="r", shape=(self._state.sizes[".lengths"] // 4,))

    def complete(self) -> None:
        """Say that all files are written; without bad lines their file goes."""
        if not self._state.sizes[".bad.jsonl"]:
            self._output.path(".bad.jsonl").unlink()
        self._state.is_complete = True
        self.save()


def _line(bad: BadLine) -> bytes:
    return orjson.dumps(bad, option=orjson.OPT_APPEND_NEWLINE)


def _read_state(output: Output) -> _State | None:
    path = output.folder / _STATE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        formats.TOKENIZATION.require_readable(content.pop(formats.KEY, None), output.folder)
        content["counts"] = [Counts(**one) for one in content["counts"]]
        return _State(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; remove {output.folder} and start again"
        ) from error


def _belongs_to_another(output: Output, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in ours if theirs.get(name) != ours[name]]
    details = [_difference(name, theirs.get(name), ours[name]) for name in names]
    return (
        f"{output.folder} was left by another command: {'; '.join(details)}. Give that command "
        "again to go on, or throw its work away: overwrite=true"
    )


def _difference(name: str, theirs: object, ours: object) -> str:
    if isinstance(theirs, Sequence) and isinstance(ours, Sequence) and not isinstance(ours, str):
        changed = [one for one in ours if one not in theirs] or list(theirs)
        shown = changed[0].get("path") if isinstance(changed[0], dict) else changed[0]
        return f"{name} differ, for one {shown} (names, sizes or times of change)"
    return f"{name} was {theirs} and is {ours}"
