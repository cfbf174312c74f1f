"""Folders that appear whole or not at all, JSON that every reader takes, refusals of the system."""

import contextlib
import errno
import json
import logging
import math
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hybrid_train.checkpoint.layout import PARTIAL
from hybrid_train.schema.problems import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name when the block ends without an error.

    Raises:
        UserError: if something stands there already, or the disk is full.
    """
    require_free(output)
    partial = _partial(output)
    if partial.exists():
        _log.warning("removing %s, which an interrupted conversion left behind", partial)
        shutil.rmtree(partial)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()  # empty
        partial.rename(output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"the disk is full: {output} could not be written and was removed; free space or "
                "choose another output=..."
            ) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def require_free(output: Path) -> None:
    """Refuse a place where something stands already.

    Raises:
        UserError: if it is a file, or a folder that is not empty.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise UserError(f"output = {output}: is there already; choose another output=...")


def _end(*_: object) -> NoReturn:
    """End by an exception, so that what is half-written is removed."""
    raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def refusals_named(**settings: Path) -> Iterator[None]:
    """Say what the system refuses, such as a permission, with the path and the setting it is of.

    Args:
        settings: what each setting names.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        said, file = error.strerror or str(error), str(error.filename or "")
        name = _setting_of(Path(file), settings) if file else None
        if name is None:
            names = ", ".join(f"{name}={path}" for name, path in settings.items())
            raise UserError(f"{said}: {file or 'a file'} ({names})") from error
        path = settings[name]
        shown = file.replace(str(_partial(path)), str(path))  # of which the user knows nothing
        where = "" if shown == str(path) else f" ({shown})"
        raise UserError(f"{name} = {path}: {said}{where}") from error


def _partial(output: Path) -> Path:
    """Return the name of a folder while it is written."""
    return output.with_name(output.name + PARTIAL)


def _setting_of(file: Path, settings: Mapping[str, Path]) -> str | None:
    """Return the setting that names a folder in which, or on the way to which, a file lies."""
    place = file.absolute()
    for name, path in settings.items():
        own = path.absolute()
        inside = any(place.is_relative_to(one) for one in (own, _partial(own)))
        if inside or own.is_relative_to(place):
            return name
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does, numbers that are none in JSON included."""
    text = json.dumps(_tagged(dict(content)), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def as_strict_json(path: Path) -> None:
    """Write a JSON file again if it has numbers that JSON has not; others stay as they are.

    Raises:
        UserError: if it is no JSON at all.
    """
    foreign = False

    def note(word: str) -> float:
        nonlocal foreign
        foreign = True
        return float(word)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=note)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}; download it again") from error
    if foreign:
        write_json(path, content)


def _tagged(value: Any) -> Any:
    """Write NaN and infinity as transformers 5 does: {"__float__": "Infinity"}."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, dict):
        return {key: _tagged(one) for key, one in value.items()}
    return [_tagged(one) for one in value] if isinstance(value, list | tuple) else value
