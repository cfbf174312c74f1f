"""The quickstart corpus: the source code of Python's own standard library, made on first use.

FOLDER/vocab-4096/
    tokenizer/                  byte-level BPE trained on the train part
    train.bin train.idx         one document per source file
    validation.bin validation.idx
    manifest.json               where it came from and how much it is
"""

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tokenize
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_train.data.token_files import write_documents
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.problems import UserError

VALIDATION_SHARE = 0.045  # of the bytes
# Tests are left out: much of them is tables, and some files are broken on purpose.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Manifest:
    """What a finished corpus consists of."""

    python: str
    asked_vocab_size: int
    vocab_size: int
    train_files: int
    train_bytes: int
    train_tokens: int
    validation_files: int
    validation_bytes: int
    validation_tokens: int


def prepare(config: Quickstart, source: Path | None = None) -> Data:
    """Build corpus, tokenizer and token files unless they are there; return where they lie.

    Each size of vocabulary has a folder of its own in `config.folder`, so that another size never
    meets the files of the first. It appears whole or not at all. Call it in one process and let
    the others wait.

    Args:
        config: the folder and the size of the vocabulary.
        source: folder of Python files; the standard library of this machine if None.

    Raises:
        UserError: if the folder cannot be written or holds something else.
    """
    folder = folder_of(config)
    if os.path.lexists(folder):
        read_manifest(folder)
        return _as_data(config, folder)
    building = folder.with_name(f".{folder.name}.building-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        _build(building, source or standard_library(), config.vocab_size)
        _publish(building, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the quickstart corpus to {folder}: {error.strerror or error}; "
            "free some space (20 MB suffice) or set data.folder to another place"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return _as_data(config, folder)


def folder_of(config: Quickstart) -> Path:
    """Where the corpus of this configuration lies, or will lie."""
    return Path(config.folder) / f"vocab-{config.vocab_size}"


def read_manifest(folder: Path) -> Manifest:
    """Read what `prepare` wrote.

    Raises:
        UserError: if it is missing or not readable.
    """
    path = folder / "manifest.json"
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is no whole quickstart corpus ({path.name}: {error}); "
            "remove it, and the next run builds it anew"
        ) from error


def standard_library() -> Path:
    """The folder of this machine's Python standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(source: Path) -> list[Path]:
    """List the Python files below `source`, without tests and installed packages, sorted."""
    found: list[Path] = []
    for folder, folders, names in source.walk():
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [folder / name for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(source).as_posix())


def split(source: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Divide files into train and validation, the same way on every call.

    Files come in the order of a hash of their names and go to validation while they fit into its
    share of the bytes; at least one file does.
    """
    sizes = {path: path.stat().st_size for path in files}
    room = VALIDATION_SHARE * sum(sizes.values())
    chosen: set[Path] = set()
    for path in sorted(files, key=lambda path: _name_hash(path, source)):
        if 0 < sizes[path] <= room:
            chosen.add(path)
            room -= sizes[path]
    if not chosen:
        chosen.add(min(files, key=lambda path: (sizes[path], path)))
    return [f for f in files if f not in chosen], [f for f in files if f in chosen]


def _build(folder: Path, source: Path, vocab_size: int) -> None:
    files = source_files(source)
    if len(files) < 2:  # noqa: PLR2004 - one to train on and one to validate on
        raise UserError(
            f"{source} holds {len(files)} Python source file(s), too few for the quickstart corpus;"
            " install the full standard library, or set data=files with token files of your own"
        )
    train, validation = (_read(part) for part in split(source, files))
    tokenizer = train_byte_level_bpe(train, vocab_size)
    tokenizer.save(folder / "tokenizer")
    manifest = Manifest(
        python=platform.python_version(),
        asked_vocab_size=vocab_size,
        vocab_size=tokenizer.vocab_size,
        train_files=len(train),
        train_bytes=_num_bytes(train),
        train_tokens=_write(folder / "train", train, tokenizer),
        validation_files=len(validation),
        validation_bytes=_num_bytes(validation),
        validation_tokens=_write(folder / "validation", validation, tokenizer),
    )
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        read_manifest(folder)  # another process finished first; its files are as good


def _read(files: Sequence[Path]) -> list[str]:
    texts: list[str] = []
    for path in files:
        with tokenize.open(path) as file:  # obeys the encoding that the source declares
            texts.append(file.read())
    return [text for text in texts if text]


def _write(prefix: Path, texts: Sequence[str], tokenizer: Tokenizer) -> int:
    def documents() -> Iterator[list[int]]:
        for ids in tokenizer.encode_batch(texts):
            yield [*ids, tokenizer.end_of_document]

    return write_documents(prefix, documents(), vocab_size=tokenizer.vocab_size)


def _as_data(config: Quickstart, folder: Path) -> Data:
    return Data(
        train=[str(folder / "train")],
        validation=[str(folder / "validation")],
        tokenizer=str(folder / "tokenizer"),
        cache=config.cache,
    )


def _name_hash(path: Path, source: Path) -> str:
    return hashlib.sha256(path.relative_to(source).as_posix().encode()).hexdigest()


def _num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
