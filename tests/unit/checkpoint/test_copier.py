"""The copier tells of a fault once, keeps its checkpoint from deletion, and gives up in words."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.copier import Copier
from hybrid_train.checkpoint.mirror import Mirror
from tests.unit.checkpoint.test_mirror import checkpoint

URL = "memory://copier/runs/a"


class FlakyStore:
    """The file system in memory, whose writes wait, or fail, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.started = threading.Event(), threading.Event()
        self.free.set()
        self.faults = 0
        put = Mirror._put
        actual = type(fsspec.filesystem("memory")).put_file

        def put_file(files: object, *words: object, **named: object) -> object:
            if self.faults:
                self.faults -= 1
                raise OSError("the network is gone")
            return actual(files, *words, **named)

        def slow(mirror: Mirror, path: Path, name: str) -> int:
            self.started.set()
            assert self.free.wait(30)
            return put(mirror, path, name)

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", put_file)
        monkeypatch.setattr(Mirror, "_put", slow)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyStore]:
    yield FlakyStore(monkeypatch)
    if fsspec.filesystem("memory").exists("/copier"):
        fsspec.filesystem("memory").rm("/copier", recursive=True)


def copier(run_dir: Path, patience_s: float = 30, notes: list[int] | None = None) -> Copier:
    def note(step: int, cause: str) -> None:
        if notes is not None:
            notes.append(step)

    return Copier(URL, run_dir, [], keep=2, patience_s=patience_s, note=note)


def test_what_waits_is_left_out_for_what_is_newer_and_the_present_one_is_spared(
    store: FlakyStore, tmp_path: Path
) -> None:
    copies = copier(tmp_path)
    store.free.clear()
    first, second, third = (checkpoint(tmp_path, step) for step in (5, 10, 15))
    copies.take(first)
    assert store.started.wait(30)
    assert copies.step == 5
    copies.take(second)
    copies.take(third)
    layout.keep_newest(tmp_path, 1, copies.step)
    assert [one.step for one in layout.complete(tmp_path)] == [5, 15]
    assert not copies.wait(0)
    store.free.set()
    assert copies.wait(30)
    assert (copies.step, copies.failure) == (None, "")
    assert Mirror(URL).steps() == [5, 15]


def test_a_fault_is_told_once_when_it_begins_and_once_when_it_is_over(
    store: FlakyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = copier(tmp_path)
    store.faults = 3
    with caplog.at_level(logging.INFO):
        copies.take(checkpoint(tmp_path, 5))
        assert copies.wait(30)
    said = [one.getMessage() for one in caplog.records]
    assert sum("cannot be reached: the network is gone" in line for line in said) == 1
    assert sum("is reached again, after" in line for line in said) == 1
    assert Mirror(URL).steps() == [5]


def test_a_copy_that_is_given_up_is_noted_and_the_next_one_is_tried(
    store: FlakyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = list[int]()
    copies = copier(tmp_path, patience_s=0.01, notes=notes)
    store.faults = 1000
    copies.take(checkpoint(tmp_path, 5))
    assert copies.wait(30)
    assert "the network is gone" in copies.failure
    assert notes == [5]
    assert "training goes on" in caplog.text
    assert "the next save tries" in caplog.text
    store.faults = 0
    copies.take(checkpoint(tmp_path, 10))
    assert copies.wait(30)
    assert copies.failure == ""
    assert Mirror(URL).steps() == [10]


def test_an_end_in_order_frees_the_url_and_brings_how_it_ended(
    store: FlakyStore, tmp_path: Path
) -> None:
    history = tmp_path / "history.jsonl"
    history.write_text("begins\n")
    copies = Copier(URL, tmp_path, [history], keep=2, patience_s=30, note=lambda step, cause: None)
    copies.take(checkpoint(tmp_path, 5))
    assert copies.wait(30)
    history.write_text("begins\nends\n")
    copies.close()
    Mirror(URL).fetch_beside(tmp_path / "back")
    assert (tmp_path / "back" / "history.jsonl").read_text() == "begins\nends\n"
    assert Mirror(URL).claim(tmp_path / "another")[1] == ""
