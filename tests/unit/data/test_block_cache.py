"""The folder of blocks keeps what was used last, and nothing that is broken."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_train.data.remote import CacheFolder
from hybrid_train.schema.problems import UserError


def put(folder: CacheFolder, name: str, size: int = 100) -> None:
    folder.put(name, iter([bytes(size // 2), bytes(size - size // 2)]))


def make_older(path: Path, *names: str) -> None:
    """Date the use of the named files, the first the longest ago."""
    for age, name in enumerate(reversed(names), start=1):
        os.utime(path / name, (10**9 - age, 10**9 - age))


def test_what_was_put_is_there_under_its_name_and_size_only(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 10**6)
    written = folder.put("a", iter([b"some ", b"bytes"]))
    found = folder.get("a", 10)
    assert found is not None
    assert written.tobytes() == found.tobytes() == b"some bytes"
    assert folder.get("a", 11) is None  # as after a crash that lost the end of the file
    assert folder.get("b", 10) is None


def test_the_files_least_recently_used_go_when_the_limit_is_passed(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 400)
    for name in "abcd":
        put(folder, name)
    make_older(tmp_path, *"abcd")
    assert folder.get("a", 100) is not None  # now the latest
    put(folder, "e")
    assert sorted(os.listdir(tmp_path)) == ["a", "d", "e"]  # 375 bytes would still be allowed


def test_the_limit_holds_for_what_earlier_runs_left(tmp_path: Path) -> None:
    for name in "abcd":
        put(CacheFolder(tmp_path, 10**6), name)
    put(CacheFolder(tmp_path, 200), "e")
    assert len(os.listdir(tmp_path)) == 1


def test_a_file_larger_than_the_limit_stays_until_the_next(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 50)
    put(folder, "a")
    assert folder.get("a", 100) is not None
    make_older(tmp_path, "a")
    put(folder, "b")
    assert os.listdir(tmp_path) == ["b"]


def test_a_mapped_file_stays_readable_when_it_is_removed(tmp_path: Path) -> None:
    mapped = CacheFolder(tmp_path, 10**6).put("a", iter([b"here"]))
    (tmp_path / "a").unlink()
    assert mapped.tobytes() == b"here"


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"first"
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        CacheFolder(tmp_path, 10**6).put("a", parts())
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"cannot keep parts of remote files in {tmp_path}/file"):
        CacheFolder(tmp_path / "file", 10**6)
