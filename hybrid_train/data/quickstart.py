"""The quickstart corpus: the source code of Python's own standard library, made on first use.

`packages` adds that of installed ones, which need not be downloaded either.

FOLDER/vocab-4096/              with packages vocab-4096-HASH: of their names and versions
    tokenizer/                  byte-level BPE trained on the train part
    train.bin train.idx         one document per source file
    validation.bin validation.idx
    manifest.json               where it came from and how much it is
    format.json                 which format the folder has
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sysconfig
import tokenize
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import Distribution, PackageNotFoundError
from itertools import batched
from pathlib import Path

from hybrid_train.data.prepare.manifest import Progress
from hybrid_train.data.token_files import write_documents
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.schema import formats
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes

VALIDATION_SHARE = 0.045  # of the bytes
# Tests are left out: much of them is tables, and some files are broken on purpose.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

_AT_ONCE = 64  # documents that are tokenized between two reports
Report = Callable[[Progress], None]
_log = logging.getLogger(__name__)


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
    packages: dict[str, dict[str, str]] = field(default_factory=dict)  # version and hash by name


def prepare(config: Quickstart, source: Path | None = None, report: Report | None = None) -> Data:
    """Build corpus, tokenizer and token files unless they are there; return where they lie.

    Each size of vocabulary has a folder of its own in `config.folder`, so that another size never
    meets the files of the first; so has each choice of packages. It appears whole or not at all.
    Call it in one process and let the others wait.

    Args:
        config: the folder and the size of the vocabulary.
        source: folder of Python files; the standard library of this machine if None.
        report: is called with how far it is, while texts become tokens.

    Raises:
        UserError: if the folder cannot be written or holds something else, or a package is not
            installed.
    """
    folder = folder_of(config)
    if os.path.lexists(folder):
        read_manifest(folder)
        return _as_data(config, folder)
    packages = [distribution(name) for name in config.packages]
    building = folder.with_name(f".{folder.name}.building-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        _log.info("building the corpus %s, once: Python files become tokens", folder)
        position = _Position(report)
        _build(building, source or standard_library(), config.vocab_size, packages, position)
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
    """Where the corpus of this configuration lies, or will lie.

    Raises:
        UserError: if a package is not installed.
    """
    name = f"vocab-{config.vocab_size}"
    if config.packages:
        versions = [f"{one}=={distribution(one).version}" for one in config.packages]
        name += f"-{hashlib.sha256(' '.join(versions).encode()).hexdigest()[:12]}"
    return Path(config.folder) / name


def versions(config: Quickstart) -> dict[str, str]:
    """Say what decides the texts: the versions of Python and of the packages.

    Raises:
        UserError: if a package is not installed.
    """
    folder = folder_of(config)
    python = read_manifest(folder).python if folder.is_dir() else platform.python_version()
    return {"python": python, **{name: distribution(name).version for name in config.packages}}


def distribution(name: str) -> Distribution:
    """Find an installed package.

    Raises:
        UserError: if there is none of this name.
    """
    try:
        return importlib.metadata.distribution(name)
    except (PackageNotFoundError, ValueError) as error:
        known = {str(one.metadata["Name"]) for one in importlib.metadata.distributions()}
        near = nearest(name, known)
        hint = f"; nearest: {near}" if near else ""
        raise UserError(f"data.packages: {name!r} is no installed package{hint}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read what `prepare` wrote.

    Raises:
        UserError: if it is missing or not readable, or of a version that is not read.
    """
    path = folder / "manifest.json"
    formats.require_readable_folder(folder, formats.QUICKSTART)
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


def read_sources(files: Sequence[Path]) -> list[str]:
    """Read Python files in the encoding that each declares; empty ones are left out."""
    texts: list[str] = []
    for path in files:
        with tokenize.open(path) as file:
            texts.append(file.read())
    return [text for text in texts if text]


class _Position:
    """How far the texts of a corpus are; reports it where somebody wants to know."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._now = Progress(bytes_read=0, total_bytes=0, documents=0, tokens=0, bad=0)

    def begin(self, total_bytes: int) -> None:
        """Say how much there is in all."""
        self._move(total_bytes=total_bytes)

    def done(self, texts: Sequence[str], tokens: int) -> None:
        """Add texts that have become tokens."""
        now = self._now
        self._move(
            bytes_read=now.bytes_read + _num_bytes(texts),
            documents=now.documents + len(texts),
            tokens=now.tokens + tokens,
        )

    def _move(self, **changes: int) -> None:
        self._now = replace(self._now, **changes)
        if self._report is not None:
            self._report(self._now)


def _build(
    folder: Path,
    source: Path,
    vocab_size: int,
    packages: Sequence[Distribution],
    position: _Position,
) -> None:
    files = source_files(source)
    if len(files) < 2:  # noqa: PLR2004 - one to train on and one to validate on
        raise UserError(
            f"{source} holds {counted(len(files), 'Python file')}, too few for the corpus; "
            "install the full standard library, or set data=files with token files of your own"
        )
    train_files, validation_files = split(source, files)
    # Of the library alone: the same ids with and without packages.
    texts = read_sources(train_files)
    _log.info("training a tokenizer on %s of them", show_bytes(_num_bytes(texts)))
    tokenizer = train_byte_level_bpe(texts, vocab_size)
    tokenizer.save(folder / "tokenizer")
    pinned = {}
    for package in packages:
        root = Path(str(package.locate_file("")))
        files = _package_files(package)
        more = split(root, files)
        train_files, validation_files = train_files + more[0], validation_files + more[1]
        pinned[package.name] = {"version": package.version, "sha256": _hash_of(root, files)}
    train, validation = read_sources(train_files), read_sources(validation_files)
    position.begin(_num_bytes(train) + _num_bytes(validation))
    manifest = Manifest(
        python=platform.python_version(),
        asked_vocab_size=vocab_size,
        vocab_size=tokenizer.vocab_size,
        train_files=len(train),
        train_bytes=_num_bytes(train),
        train_tokens=_write(folder / "train", train, tokenizer, position),
        validation_files=len(validation),
        validation_bytes=_num_bytes(validation),
        validation_tokens=_write(folder / "validation", validation, tokenizer, position),
        packages=pinned,
    )
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    formats.write_stamp(folder, formats.QUICKSTART)


def _package_files(package: Distribution) -> list[Path]:
    """List the Python files that a package has installed, without its tests.

    Raises:
        UserError: if there are too few to be divided.
    """
    listed = [file for file in package.files or () if file.suffix == ".py"]
    kept = [file for file in listed if not _LEFT_OUT & set(file.parts)]
    files = sorted(Path(str(package.locate_file(file))) for file in kept)
    if len(files) < 2:  # noqa: PLR2004 - one to train on and one to validate on
        raise UserError(
            f"data.packages: {package.name} has installed {counted(len(files), 'Python file')}; "
            "take another"
        )
    return files


def _hash_of(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        read_manifest(folder)  # another process finished first; its files are as good


def _write(prefix: Path, texts: Sequence[str], tokenizer: Tokenizer, position: _Position) -> int:
    def documents() -> Iterator[list[int]]:
        for some in batched(texts, _AT_ONCE):
            encoded = tokenizer.encode_batch(some)
            for ids in encoded:
                yield [*ids, tokenizer.end_of_document]
            position.done(some, sum(len(ids) + 1 for ids in encoded))

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
