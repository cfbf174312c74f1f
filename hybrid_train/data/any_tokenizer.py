"""Tokenizers of every library: what each offers, how one is opened, and the files of its folder."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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


class AnyTokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def end_of_document(self) -> int:
        """Id of the token that closes each document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file that defines the vocabulary, in hexadecimal."""

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, without any special token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out tokens such as end of document."""

    def save(self, folder: str | Path) -> None:
        """Write a folder from which `open_tokenizer` reads the same tokenizer."""


class FolderTokenizer(AnyTokenizer, Protocol):
    """A tokenizer that was read from a folder, which says how its special tokens are used."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens that the folder names, by their use: bos_token and others."""

    def encode_prompt(self, text: str, *, begin: bool, special: bool) -> list[int]:
        """Turn text into token ids.

        Args:
            text: the text.
            begin: put around it what the tokenizer puts around a text, such as a BOS token.
            special: take special tokens that are spelt out in it for what they are.
        """

    def is_joined_byte(self, token: int) -> bool:
        """Tell whether a token is a byte that is text only together with all bytes beside it.

        Then what is written for it may change with each byte that follows.
        """


def open_tokenizer(path: str | Path) -> FolderTokenizer:
    """Read a tokenizer.json folder, a folder with a tokenizer.model, or a SentencePiece file.

    A folder with both is read by its tokenizer.json, as transformers does.

    Raises:
        UserError: if there is no tokenizer, it cannot be read, names no end-of-document token, or
            is of a version that is not read.
    """
    place = Path(path)
    try:
        return _open(place)
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror or error}"
        raise UserError(f"the tokenizer {place} cannot be opened: {what}") from error


def _open(place: Path) -> FolderTokenizer:
    if place.is_dir():
        _require_readable(place)
    if place.suffix == ".model" or (
        (place / "tokenizer.model").is_file() and not (place / "tokenizer.json").is_file()
    ):
        from hybrid_train.data.sentencepiece import SentencePieceTokenizer  # few runs need it

        return SentencePieceTokenizer.load(place)
    if not (place / "tokenizer.json").is_file():
        raise UserError(
            f"{place} holds no tokenizer: name a Hugging Face folder (tokenizer.json in it), a "
            "folder with a SentencePiece tokenizer.model, or such a .model file"
        )
    from hybrid_train.data.tokenizers import Tokenizer

    return Tokenizer.load(place)


def _require_readable(folder: Path) -> None:
    """Refuse a tokenizer that a newer version made in a way that this one does not know.

    Raises:
        UserError: naming that version, or a file that is damaged.
    """
    TOKENIZER.require_readable(read_settings(folder / CONFIG).get(_FORMAT), folder)


def settings_of(special: Mapping[str, str]) -> dict[str, Any]:
    """Return what tokenizer_config.json of a tokenizer that was made here says.

    Args:
        special: its special tokens by their use.
    """
    return {**special, _FORMAT: TOKENIZER.stamp()}


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
