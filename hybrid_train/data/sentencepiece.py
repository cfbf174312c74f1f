"""Gateway to the `sentencepiece` library: text to token ids and back."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from hybrid_train.config.problems import UserError

with warnings.catch_warnings():
    # sentencepiece 0.2.3: types made by SWIG, which Python 3.12 finds without a __module__.
    warnings.filterwarnings("ignore", message="builtin type", category=DeprecationWarning)
    from sentencepiece import SentencePieceProcessor

FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model. Control tokens spelt out in a text are encoded as its letters."""

    def __init__(self, model: bytes, end_of_document: int) -> None:
        self._model = model
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
        return cls(model, _end_of_document(processor, file))

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

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model, and beside it the name of the end-of-document token."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / FILE).write_bytes(self._model)
        special = {"eos_token": self._processor.id_to_piece(self._end_of_document)}
        text = json.dumps(special, indent=2) + "\n"
        (place / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _end_of_document(processor: SentencePieceProcessor, file: Path) -> int:
    """Return the end of a sentence of the model; without one, the eos_token of the folder."""
    if processor.eos_id() >= 0:
        return int(processor.eos_id())
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise UserError(f"{config} is no JSON: {error}; download it again") from error
        name = token.get("content") if isinstance(token, dict) else token
        found = processor.piece_to_id(name) if name else processor.unk_id()
        if found != processor.unk_id():
            return int(found)
    raise UserError(
        f"{file} has no end-of-document token: it was trained without </s>; name another of its "
        f"pieces as eos_token in {config}"
    )
