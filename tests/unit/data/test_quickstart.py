"""The quickstart corpus, built from a small stand-in for the standard library."""

import dataclasses
import errno
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy
import pytest

from hybrid_train.data import quickstart
from hybrid_train.data.quickstart import prepare, read_manifest, source_files, split
from hybrid_train.data.token_files import TokenReader
from hybrid_train.data.tokenizers import Tokenizer
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.formats import FILE_NAME, QUICKSTART
from hybrid_train.schema.problems import UserError

if TYPE_CHECKING:
    from hybrid_train.data.prepare.manifest import Progress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    for i in range(60):
        path = folder / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function{i}(value):\n    return value * {i}\n" * (1 + i % 7))
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    for name in ("test", "package0/tests", "idlelib/idle_test", "site-packages/x", "__pycache__"):
        (folder / name).mkdir(parents=True)
        (folder / name / "left_out.py").write_text("left_out = True\n")
    (folder / "notes.txt").write_text("no Python")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Quickstart:
    return Quickstart(folder=str(tmp_path / "quickstart"), vocab_size=320)


def texts(prefix: str, tokenizer: Tokenizer) -> list[str]:
    documents = TokenReader(prefix)
    found = [documents[i].tolist() for i in range(len(documents))]
    assert all(ids[-1] == tokenizer.end_of_document for ids in found)
    return [tokenizer.decode(ids[:-1]) for ids in found]


def test_every_source_file_is_one_document_of_one_part(source: Path, config: Quickstart) -> None:
    data = prepare(config, source)
    assert data.tokenizer is not None
    tokenizer = Tokenizer.load(data.tokenizer)
    train, validation = texts(data.train[0], tokenizer), texts(data.validation[0], tokenizer)
    written = [path.read_text("latin-1") for path in source_files(source)]
    assert sorted(train + validation) == sorted(written)
    assert len(written) == 61
    assert not any("left_out" in text for text in written)


def test_the_manifest_counts_what_was_written(source: Path, config: Quickstart) -> None:
    data = prepare(config, source)
    manifest = read_manifest(Path(data.train[0]).parent)
    assert manifest.train_tokens == TokenReader(data.train[0]).lengths.sum()
    assert manifest.validation_tokens == TokenReader(data.validation[0]).lengths.sum()
    assert manifest.train_files + manifest.validation_files == 61
    share = manifest.validation_bytes / (manifest.train_bytes + manifest.validation_bytes)
    assert 0.035 < share < 0.05


def test_packages_add_their_source_to_the_same_token_ids(source: Path, config: Quickstart) -> None:
    plain = prepare(config, source)
    more = prepare(dataclasses.replace(config, packages=["pluggy"]), source)
    assert more.train[0] != plain.train[0]
    ids = [Path(str(data.tokenizer), "tokenizer.json").read_bytes() for data in (plain, more)]
    assert ids[0] == ids[1]
    written = texts(more.train[0], Tokenizer.load(str(more.tokenizer)))
    written += texts(more.validation[0], Tokenizer.load(str(more.tokenizer)))
    assert Path(pluggy.__file__).read_text() in written
    pinned = read_manifest(Path(more.train[0]).parent).packages["pluggy"]
    assert pinned["version"] == version("pluggy")
    assert len(pinned["sha256"]) == 64
    with pytest.raises(UserError, match=r"'plugy' is no installed package; nearest: pluggy"):
        prepare(dataclasses.replace(config, packages=["plugy"]), source)


def test_a_build_reports_how_far_it_is_and_a_second_call_has_nothing_to_report(
    source: Path, config: Quickstart
) -> None:
    seen: list[Progress] = []
    data = prepare(config, source, seen.append)
    done = [one.bytes_read for one in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, seen[-1].total_bytes)
    made = read_manifest(Path(data.train[0]).parent)
    assert seen[-1].documents == made.train_files + made.validation_files
    assert seen[-1].tokens == made.train_tokens + made.validation_tokens
    seen.clear()
    prepare(config, source, seen.append)
    assert seen == []


def test_a_second_call_reuses_what_is_there(source: Path, config: Quickstart) -> None:
    first = prepare(config, source)
    written = Path(first.train[0] + ".bin").stat()
    assert prepare(config, source) == first
    assert Path(first.train[0] + ".bin").stat() == written


def test_building_twice_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    first, second = (
        prepare(Quickstart(folder=str(tmp_path / name), vocab_size=320), source) for name in "ab"
    )
    for name in (".bin", ".idx"):
        assert Path(first.train[0] + name).read_bytes() == Path(second.train[0] + name).read_bytes()


def test_another_vocabulary_stands_beside_the_first(source: Path, config: Quickstart) -> None:
    first = prepare(config, source)
    second = prepare(Quickstart(folder=config.folder, vocab_size=310), source)
    assert Tokenizer.load(str(first.tokenizer)).vocab_size == 320
    assert Tokenizer.load(str(second.tokenizer)).vocab_size == 310


def test_a_build_that_fails_leaves_nothing_and_says_what_to_do(
    source: Path, config: Quickstart, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_args: object, **_options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quickstart, "write_documents", full_disk)
    with pytest.raises(UserError, match=r"No space left on device; free some space"):
        prepare(config, source)
    assert list(Path(config.folder).iterdir()) == []


def test_a_damaged_corpus_is_named(source: Path, config: Quickstart) -> None:
    folder = Path(prepare(config, source).train[0]).parent
    (folder / "manifest.json").write_text(json.dumps({"python": "3.12"}))
    with pytest.raises(UserError, match=r"no whole quickstart corpus .* remove it"):
        prepare(config, source)


def test_a_corpus_says_its_format_and_one_of_before_says_none(
    source: Path, config: Quickstart
) -> None:
    folder = Path(prepare(config, source).train[0]).parent
    assert json.loads((folder / FILE_NAME).read_text()) == QUICKSTART.stamp()
    newer = QUICKSTART.stamp() | {"version": QUICKSTART.version + 1}
    (folder / FILE_NAME).write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"quickstart corpus, format 2\).*upgrade hybrid_train"):
        prepare(config, source)
    (folder / FILE_NAME).unlink()
    prepare(config, source)


def test_a_source_without_files_is_named(tmp_path: Path, config: Quickstart) -> None:
    with pytest.raises(UserError, match="holds 0 Python files"):
        prepare(config, tmp_path)


def test_the_split_stays_the_same_and_divides_by_size() -> None:
    library = quickstart.standard_library()
    files = source_files(library)
    train, validation = split(library, files)
    assert len(files) > 300
    assert sorted(train + validation) == files
    assert split(library, files) == (train, validation)
    share = sum(f.stat().st_size for f in validation) / sum(f.stat().st_size for f in files)
    assert 0.04 < share < 0.05
