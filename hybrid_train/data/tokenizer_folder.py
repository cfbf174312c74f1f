"""The files of a tokenizer folder in the Hugging Face format: which they are, what they name."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_train.schema.formats import TOKENIZER
from hybrid_train.schema.problems import UserError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")  # one of them makes a tokenizer
CONFIG = "tokenizer_config.json"
_FORMAT = "hybrid_train_format"  # key in it; transformers leaves keys alone that it does not know
# Data only: what else lies in such a folder, code above all, stays there.
_FILES = (
    *VOCABULARY_FILES,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")


def tokenizer_files(folder: Path) -> list[str]:
    """List the files of a tokenizer by their paths below its folder."""
    found = [name for name in _FILES if (folder / name).is_file()]
    for templates in _TEMPLATE_FOLDERS:
        files = sorted((folder / templates).glob("*.jinja"))
        found += [f"{templates}/{file.name}" for file in files if file.is_file()]
    return found


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Make the files of the tokenizer in one folder those of another; return their names."""
    found = tokenizer_files(source)
    for stale in set(tokenizer_files(target)) - set(found):
        (target / stale).unlink()
    for name in found:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not (place.exists() and place.samefile(source / name)):
            shutil.copyfile(source / name, place)
    return found


def settings_of(special: Mapping[str, str]) -> dict[str, Any]:
    """Return what tokenizer_config.json of a tokenizer that was made here says.

    Args:
        special: its special tokens by their use.
    """
    return {**special, _FORMAT: TOKENIZER.stamp()}


def require_readable(folder: Path) -> None:
    """Refuse a tokenizer that a newer version made in a way that this one does not know.

    Raises:
        UserError: naming that version, or a file that is damaged.
    """
    TOKENIZER.require_readable(read_settings(folder / CONFIG).get(_FORMAT), folder)


def has_vocabulary(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Tell whether two folders hold one tokenizer: equal tokens, an equal end of documents.

    Templates and the other special tokens may differ. A folder may lack one of two forms of the
    vocabulary that the other has.

    Raises:
        UserError: if a file that names the special tokens is damaged.
    """
    mine, theirs = _vocabularies(one), _vocabularies(other)
    common = mine.keys() & theirs.keys()
    if any(mine[name] != theirs[name] for name in common) or bool(mine) != bool(theirs):
        return False
    if mine and not common:
        return False
    ends = [named_tokens(folder).get("eos_token") for folder in (one, other)]
    return None in ends or ends[0] == ends[1]


def _vocabularies(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in VOCABULARY_FILES
        if (folder / name).is_file()
    }


def named_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that a folder names, such as eos_token, as they are spelt.

    Raises:
        UserError: if a file is damaged.
    """
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG):  # the second counts where both name one
        for key, token in read_settings(folder / name).items():
            if isinstance(token, dict):  # written by older versions of transformers
                token = token.get("content")
            if key.endswith("_token") and isinstance(token, str) and token:
                found[key] = token
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings; one that is not there has none.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings, but {type(found).__name__}; download it again")
    return found
