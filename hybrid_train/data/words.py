"""A tokenizer whose tokens are words from a list: the vocabulary of synthetic streams."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hybrid_train.data.tokenizer_folder import settings_of
from hybrid_train.data.tokenizers import END_OF_DOCUMENT
from hybrid_train.schema.problems import UserError


class WordTokenizer:
    """Words with a space between them, as token ids; id 0 closes a document.

    It has the interface of `hybrid_train.data.tokenizers.Tokenizer`, which reads what is saved
    here. Where a text is written by hand, the end-of-document token is no word of it.

    Args:
        words: different ones, none with a space in it.
    """

    end_of_document = 0

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [END_OF_DOCUMENT, *words]
        self._ids = {word: number for number, word in enumerate(self._words)}
        if len(self._ids) < len(self._words) or any(len(word.split()) != 1 for word in words):
            raise ValueError("the words of a tokenizer differ and have no spaces")

    @property
    def vocab_size(self) -> int:
        """Number of words, and one for the end of a document."""
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids.

        Raises:
            UserError: if it has a word that the vocabulary has not.
        """
        found = [self._ids.get(word, 0) for word in text.split()]
        if 0 in found:
            word = text.split()[found.index(0)]
            some = ", ".join(self._words[1:9])
            raise UserError(
                f"{word!r} is no word of this run's {self.vocab_size - 1}; its sources are "
                f"synthetic streams, which know words such as {some}"
            )
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; `skip_special` leaves out the end of a document.

        Ids beyond the vocabulary, which a padded model may give, are left out as by `Tokenizer`.
        """
        kept = (n for n in ids if (n or not skip_special) and n < len(self._words))
        return " ".join(self._words[number] for number in kept)

    @property
    def fingerprint(self) -> str:
        """Changes when a word or its id does."""
        return hashlib.sha256(json.dumps(self._words).encode()).hexdigest()[:32]

    def save(self, folder: str | Path) -> None:
        """Write the folder in the Hugging Face format."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT}
        config = {
            **settings_of(special),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        files = {
            "tokenizer.json": self._as_json(),
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
        }
        for name, content in files.items():
            (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _as_json(self) -> dict[str, object]:
        """The format of the `tokenizers` library (0.23): words, split at white space."""
        end = {
            "id": 0, "content": END_OF_DOCUMENT, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": END_OF_DOCUMENT},
        }
