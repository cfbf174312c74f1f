"""Folders that appear whole or not at all, and the files that go along as they are."""

import contextlib
import errno
import json
import logging
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hybrid_train.checkpoint.layout import PARTIAL
from hybrid_train.config.problems import UserError

# Data only: what else lies in a folder, code above all, stays there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = {"tokenizer.json", "tokenizer.model"}  # one of them makes a tokenizer
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name when the block ends without an error.

    Raises:
        UserError: if something stands there already, or the disk is full.
    """
    require_free(output)
    partial = output.with_name(output.name + PARTIAL)
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


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the files of a tokenizer, and return their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
