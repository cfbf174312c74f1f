"""metrics.jsonl: one line of JSON per step, in the run folder; always written."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import orjson

from hybrid_train.schema.problems import DISK, UserError
from hybrid_train.tracking.metrics import metric

FILE_NAME = "metrics.jsonl"
_NUMBERS = frozenset({int, float})


class JsonLines:
    """Writes a line a step and flushes it, so that a killed run keeps what it has seen.

    A resumed run first drops the lines after its checkpoint: they will be written again. A value
    that is not finite is written as null, since JSON has no word for it.

    Attributes:
        dropped: those lines.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        self._last_step = resume_step
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.dropped = drop_after(path, resume_step)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of a step.

        Raises:
            ValueError: if a metric is unknown, or the step has a line already.
            UserError: if the disk takes no more.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}; log a step once")
        line: dict[str, float | None] = {"step": step}
        for name, value in metrics.items():
            metric(name)
            line[name] = value if math.isfinite(value) else None
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        self._last_step = step

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read all whole lines of a metrics.jsonl; null becomes NaN.

    The last line may be cut short, if the run was killed while it wrote; it is left out.

    Raises:
        UserError: if another line is no JSON object of numbers.
    """
    return _read(path, _NUMBERS)


def _read(path: Path, types: frozenset[type]) -> list[dict[str, float]]:
    """Read the whole lines of a file whose values have these types, the step among them."""
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]  # what follows the last line break is no whole line
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            values = orjson.loads(line)  # of a long run there are a hundred megabytes
            if b"null" in line:
                values = {k: math.nan if v is None else v for k, v in values.items()}
            counted = type(values["step"]) is type(values.get("tokens", 0)) is int
            if not counted or not types.issuperset(map(type, values.values())):
                raise TypeError("a value of another kind")
        except (orjson.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
            text = line[:80].decode(errors="replace")
            raise UserError(f"{path}, line {number} is damaged: {text!r}") from error
        found.append(values)
    return found


def drop_after(path: Path, step: int) -> list[dict[str, float]]:
    """Keep the lines up to `step`; the file is replaced as a whole or not at all.

    Returns:
        What was dropped.
    """
    if not path.exists():
        return []
    found = _read(path, _NUMBERS | {str})  # a damaged file is not silently shortened
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    part = path.with_suffix(".jsonl.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return [line for line in found if line["step"] > step]


def _cannot_write(path: Path, error: OSError) -> UserError:
    explained = UserError(
        f"cannot write {path}: {error.strerror}; make room or permit it, then start the same "
        f"command again: the run goes on from its last checkpoint"
    )
    explained.kind = DISK
    return explained
