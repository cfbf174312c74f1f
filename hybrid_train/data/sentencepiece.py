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


class SentencePieceTokenizer:
    """A SentencePiece model. Control tokens spelt out in a text are encoded as its letters."""

    def __init__(self, model: bytes, end_of_document: int, folder: Path | None = None) -> None:
        self._model = model
        self._folder = folder  # that it was read from, if more than the model counts there
        self._processor = SentencePieceProcessor(model_proto=model)
        self._end_of_document = end_of_document

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
        try:
            processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{file} is no SentencePiece model; download it again") from error
        folder = file.parent if Path(path).is_dir() else None
        return cls(model, _end_of_document(processor, file), folder)

    @cached_property
    def vocab_size(self) -> int:
        """Number of pieces; ids go from 0 to one less."""
        return int(self._processor.get_piece_size())

    @property
    def end_of_document(self) -> int:
        """Id of the token that closes each document (</s> of most models)."""
        return self._end_of_document

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hexadecimal."""
        return hashlib.sha256(self._model).hexdigest()

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
        ids = {use: model.piece_to_id(token) for use, token in named.items()}
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
        """The pieces that text does not hold, by their spelling."""
        model = self._processor
        numbers = (n for n in range(self.vocab_size) if model.is_control(n))
        return {str(model.id_to_piece(number)): number for number in numbers}

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out tokens such as end of document."""
        listed = [int(one) for one in ids]
        if skip_special:
            return str(self._processor.decode(listed))  # the library writes no control token
        parts: list[str] = []
        run: list[int] = []
        for one in listed:
            if self._processor.is_control(one):
                parts += [str(self._processor.decode(run)), self._processor.id_to_piece(one)]
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


def _end_of_document(processor: SentencePieceProcessor, file: Path) -> int:
    """Return the end of a sentence of the model; without one, the eos_token of the folder."""
    if processor.eos_id() >= 0:
        return int(processor.eos_id())
    config = file.with_name(CONFIG)
    name = named_tokens(file.parent).get("eos_token")
    found = processor.piece_to_id(name) if name else processor.unk_id()
    if found != processor.unk_id():
        return int(found)
    raise UserError(
        f"{file} has no end-of-document token: it was trained without </s>; name another of its "
        f"pieces as eos_token in {config}"
    )
