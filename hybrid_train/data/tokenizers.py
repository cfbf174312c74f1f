"""Gateway to the `tokenizers` library: text to token ids and back, and training a tokenizer.

Folders are in the Hugging Face format, so `transformers` reads what is saved here.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from hybrid_train.config.problems import UserError

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer:
    """A tokenizer of a Hugging Face folder.

    Text stays text: a special token that is spelt out in it is encoded as its letters, so no text
    can close a document by accident.
    """

    def __init__(self, backend: Backend, end_of_document: str, text: str | None = None) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()  # some folders ask for both: made for batches of sentences
        self._backend.no_padding()
        self._end_of_document = end_of_document
        self._text = text or backend.to_str(pretty=True)  # of tokenizer.json

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, and the end-of-document token from the files beside it.

        Raises:
            UserError: if a file is missing, unreadable or names no end-of-document token.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; data.tokenizer must name a Hugging Face tokenizer folder"
            )
        try:
            text = path.read_bytes().decode("utf-8")
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer: {error}; download it again") from error
        end = _end_of_document(Path(folder))
        if backend.token_to_id(end) is None:
            raise UserError(f"{path} lacks the end-of-document token {end!r} that its folder names")
        return cls(backend, end, text)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @property
    def description(self) -> str:
        """Content of tokenizer.json: normalizer, pre-tokenizer, model, added tokens."""
        return self._text

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def end_of_document(self) -> int:
        """Id of the token that closes each document (eos_token of the folder)."""
        found = self._backend.token_to_id(self._end_of_document)
        assert found is not None  # `load` and the trainer see to it
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, without any special token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out tokens such as end of document."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def save(self, folder: str | Path) -> None:
        """Write the folder in the Hugging Face format."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Not with the library's own `save`: a full disk is no OSError there.
        (path / "tokenizer.json").write_bytes(self._text.encode())
        special = {"bos_token": self._end_of_document, "eos_token": self._end_of_document}
        config = {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(path / "tokenizer_config.json", config)
        _write_json(path / "special_tokens_map.json", special)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_DOCUMENT,)
) -> Tokenizer:
    """Train a byte-level BPE, which can write any text; the first special token closes a document.

    Special tokens get the lowest ids in their order, so the end of a document is 0.

    A small corpus has fewer merges than asked for: then `vocab_size` of the result is smaller.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, special_tokens[0])


def _end_of_document(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}; download it again") from error
        if isinstance(token, dict):  # written by older versions of transformers
            token = token.get("content")
        if token:
            return str(token)
    raise UserError(
        f"{folder} names no end-of-document token; add eos_token to its tokenizer_config.json"
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
