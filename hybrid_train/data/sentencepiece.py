"""Gateway to the `sentencepiece` library: text to token ids and back."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from hybrid_train.data.any_tokenizer import (
    CONFIG,
    copy_tokenizer,
    named_tokens,
    read_settings,
    settings_of,
)
from hybrid_train.schema.problems import UserError

with warnings.catch_warnings():
    # sentencepiece 0.2.3: types made by SWIG, which Python 3.12 finds without a __module__.
    warnings.filterwarnings("ignore", message="builtin type", category=DeprecationWarning)
    from sentencepiece import SentencePieceProcessor

FILE = "tokenizer.model"
_ADDED = "added_tokens.json"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* 0\n")  # a token in base64 and its rank, line by line


class SentencePieceTokenizer:
    """A SentencePiece model, with the tokens that its folder adds behind its pieces.

    Control tokens and added ones that are spelt out in a text are encoded as its letters.
    """

    def __init__(self, model: bytes, end_of_document: int, folder: Path | None = None) -> None:
        self._model = model
        self._folder = folder  # that it was read from, if more than the model counts there
        self._processor = SentencePieceProcessor(model_proto=model)
        self._end_of_document = end_of_document
        self._added = _added(folder, self._processor) if folder else {}
        self._names = {number: name for name, number in self._added.items()}

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a model from its file, or from tokenizer.model of a folder.

        Raises:
            UserError: if the file is missing, unreadable or has no end-of-document token.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"{file} does not exist; name a SentencePiece model or its folder")
        model = file.read_bytes()
        if _TIKTOKEN.match(model):
            raise UserError(
                f"{file} is no SentencePiece model but tiktoken's list of tokens, which does not "
                "say how text is cut; take the tokenizer.json of the same model (Llama 3 has both)"
            )
        try:
            processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{file} is no SentencePiece model; download it again") from error
        folder = file.parent if Path(path).is_dir() else None
        return cls(model, _end_of_document(processor, file), folder)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, of a piece or of a token that the folder adds."""
        return max(int(self._processor.get_piece_size()) - 1, *self._added.values(), -1) + 1

    @property
    def end_of_document(self) -> int:
        """Id of the token that closes each document (</s> of most models)."""
        return self._end_of_document

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, and of the tokens that are added to it, in hexadecimal."""
        added = json.dumps(self._added, sort_keys=True) if self._added else ""
        return hashlib.sha256(self._model + added.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, without any special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, in this thread."""
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens that the folder, or else the model, names, by their use."""
        model = self._processor
        own = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "pad_token": model.pad_id(),
        }
        found = {use: int(one) for use, one in own.items() if one >= 0}
        named = named_tokens(self._folder) if self._folder else {}
        ids = {use: self._added.get(one, model.piece_to_id(one)) for use, one in named.items()}
        found |= {use: int(one) for use, one in ids.items() if one != model.unk_id()}
        return found | {"eos_token": self._end_of_document}

    def encode_prompt(self, text: str, *, begin: bool, special: bool) -> list[int]:
        """Turn text into token ids, with the edges that the settings of the folder ask for."""
        ids: list[int] = []
        names = [re.escape(name) for name in self._controls] if special else []
        for part in re.split(f"({'|'.join(names)})", text) if names else [text]:
            ids += (
                [self._controls[part]] if special and part in self._controls else self.encode(part)
            )
        settings = read_settings(self._folder / CONFIG) if begin and self._folder else {}
        edges = [
            [self.special_ids[f"{edge}_token"]]
            if settings.get(f"add_{edge}_token") and f"{edge}_token" in self.special_ids
            else []
            for edge in ("bos", "eos")
        ]
        return [*edges[0], *ids, *edges[1]]

    @cached_property
    def _controls(self) -> dict[str, int]:
        """The tokens that text does not hold, by their spelling; of two the longer first."""
        model = self._processor
        numbers = (n for n in range(model.get_piece_size()) if model.is_control(n))
        found = {str(model.id_to_piece(number)): number for number in numbers} | self._added
        return {name: found[name] for name in sorted(found, key=len, reverse=True)}

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out tokens such as end of document.

        Ids of no token, as those of the rows that pad an embedding, are no text, as for
        `transformers`.
        """
        size = self._processor.get_piece_size()
        listed = [int(one) for one in ids if one < size or one in self._names]
        if skip_special:  # the library writes no control token
            return str(self._processor.decode([one for one in listed if one < size]))
        parts: list[str] = []
        run: list[int] = []
        for one in listed:
            if one >= size or self._processor.is_control(one):
                name = self._names.get(one) or self._processor.id_to_piece(one)
                parts += [str(self._processor.decode(run)), str(name)]
                run = []
            else:
                run.append(one)
        return "".join([*parts, str(self._processor.decode(run))])

    def is_joined_byte(self, token: int) -> bool:
        """Tell that no byte is one: the library writes each character as soon as it is whole."""
        return False

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model and the name of the end-of-document token; copy a whole folder."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            copy_tokenizer(self._folder, place)
            return
        (place / FILE).write_bytes(self._model)
        special = {"eos_token": self._processor.id_to_piece(self._end_of_document)}
        text = json.dumps(settings_of(special), indent=2) + "\n"
        (place / CONFIG).write_text(text, encoding="utf-8")


def _added(folder: Path, processor: SentencePieceProcessor) -> dict[str, int]:
    """Return the tokens of a folder that its model does not have, by their spelling.

    Raises:
        UserError: if a file that names them is damaged.
    """
    listed = read_settings(folder / CONFIG).get("added_tokens_decoder", {})
    try:
        found = {str(one["content"]): int(number) for number, one in listed.items()}
        found |= {name: int(number) for name, number in read_settings(folder / _ADDED).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: {CONFIG} or {_ADDED} does not say which tokens are added to the model: "
            f"{error!r}; download both again"
        ) from error
    size = processor.get_piece_size()
    return {name: number for name, number in found.items() if number >= size}


def _end_of_document(processor: SentencePieceProcessor, file: Path) -> int:
    """Return the end of a sentence of the model; without one, the eos_token of the folder."""
    if processor.eos_id() >= 0:
        return int(processor.eos_id())
    config = file.with_name(CONFIG)
    name = named_tokens(file.parent).get("eos_token", "")
    found = _added(file.parent, processor).get(name, processor.piece_to_id(name))
    if found != processor.unk_id():
        return int(found)
    raise UserError(
        f"{file} has no end-of-document token: it was trained without </s>; name another of its "
        f"pieces as eos_token in {config}"
    )
