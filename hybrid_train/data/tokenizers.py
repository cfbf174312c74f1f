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

from hybrid_train.data.any_tokenizer import CONFIG, copy_tokenizer, named_tokens, settings_of
from hybrid_train.schema.problems import UserError

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer:
    """A tokenizer of a Hugging Face folder.

    Text stays text: a special token that is spelt out in it is encoded as its letters, so no text
    can close a document by accident; a prompt may ask for it (`encode_prompt`).
    """

    def __init__(
        self,
        backend: Backend,
        special: Mapping[str, str],
        text: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()  # some folders ask for both: made for batches of sentences
        self._backend.no_padding()
        self._special = dict(special)  # eos_token and others, as they are spelt
        self._text = text or backend.to_str(pretty=True)  # of tokenizer.json
        self._folder = folder  # that it was read from

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
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer: {error}; download it again") from error
        special = named_tokens(path.parent)
        if "eos_token" not in special:
            raise UserError(
                f"{folder} names no end-of-document token; add eos_token to its {CONFIG}"
            )
        end = special["eos_token"]
        if backend.token_to_id(end) is None:
            raise UserError(f"{path} lacks the end-of-document token {end!r} that its folder names")
        return cls(backend, special, text, path.parent)

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
        return self.special_ids["eos_token"]  # `load` and the trainer see to it

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens that the folder names and the vocabulary has, by their use."""
        ids = {use: self._backend.token_to_id(token) for use, token in self._special.items()}
        return {use: int(found) for use, found in ids.items() if found is not None}

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, without any special token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def encode_prompt(self, text: str, *, begin: bool, special: bool) -> list[int]:
        """Turn text into token ids, as transformers' `tokenizer(text)` does with both settings."""
        self._backend.encode_special_tokens = not special
        try:
            return list(self._backend.encode(text, add_special_tokens=begin).ids)
        finally:
            self._backend.encode_special_tokens = True

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out tokens such as end of document."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    @cached_property
    def _joined_bytes(self) -> frozenset[int]:
        """Tokens <0x00> to <0xFF>, where the decoder joins them: one that fits nowhere spoils all.

        tokenizers 0.23.3, decoders/byte_fallback.rs.
        """
        if '"ByteFallback"' not in json.dumps(json.loads(self._text).get("decoder")):
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(one for one in ids if one is not None)

    def is_joined_byte(self, token: int) -> bool:
        """Tell whether a token is a byte that is text only together with all bytes beside it."""
        return token in self._joined_bytes

    def save(self, folder: str | Path) -> None:
        """Write the folder in the Hugging Face format; one that was read is copied as it is."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self._folder is not None:
            copy_tokenizer(self._folder, path)
            return
        # Not with the library's own `save`: a full disk is no OSError there.
        (path / "tokenizer.json").write_bytes(self._text.encode())
        config = {
            **settings_of(self._special),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(path / CONFIG, config)
        _write_json(path / "special_tokens_map.json", self._special)


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
    return Tokenizer(backend, dict.fromkeys(("bos_token", "eos_token"), special_tokens[0]))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
