"""What every tokenizer offers, whichever library does the work, and how one is opened."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hybrid_train.data.tokenizer_folder import require_readable
from hybrid_train.schema.problems import UserError


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
        require_readable(place)
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
