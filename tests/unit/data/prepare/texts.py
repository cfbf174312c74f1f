"""A small tokenizer and small text files for the tests of data preparation."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.data.prepare.manifest import Progress
from hybrid_train.data.prepare.tokenization import Finished, tokenize
from hybrid_train.data.token_files import TokenReader
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.schema.prepare import TokenizeJob

CORPUS = [f"def name{i}(x):\n    return x + {i * i}  # it's the {i}th\n" for i in range(300)]
TOKENIZER = train_byte_level_bpe(CORPUS, vocab_size=400)


def some_texts(count: int) -> list[str]:
    """Texts of different lengths, some of them long, some not in ASCII."""
    return [
        CORPUS[i % 300] * (1 + i % 7)
        + ("caf\u00e9 \u4e2d\u6587 \U0001f600\n" if i % 5 == 0 else "")
        for i in range(count)
    ]


def json_lines(texts: Iterable[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: text}).encode() + b"\n" for text in texts)


def ids_of(texts: Iterable[str], tokenizer: AnyTokenizer = TOKENIZER) -> list[list[int]]:
    """What token files of these texts must hold."""
    return [[*tokenizer.encode(text), tokenizer.end_of_document] for text in texts]


def read_ids(prefix: str | Path) -> list[list[int]]:
    reader = TokenReader(prefix)
    return [reader[number].tolist() for number in range(len(reader))]


def job(folder: Path, *inputs: Path | str, **changes: object) -> TokenizeJob:
    """A job that reads `inputs` and writes FOLDER/out with the small tokenizer."""
    if not (folder / "tokenizer").exists():
        TOKENIZER.save(folder / "tokenizer")
    settings = {
        "output": str(folder / "out"), "tokenizer": str(folder / "tokenizer"),
        "input": [str(one) for one in inputs], "block_kb": 1, **changes,
    }  # fmt: skip
    return TokenizeJob(**settings)  # type: ignore[arg-type]


def run(asked: TokenizeJob, workers: int = 1) -> tuple[Finished, list[Progress]]:
    seen: list[Progress] = []
    return tokenize(asked, workers, seen.append), seen


def names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "tokenizer")
