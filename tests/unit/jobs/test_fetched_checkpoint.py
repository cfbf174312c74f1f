"""What lies behind a URL becomes a folder: found by name or newest, fetched once, or refused."""

import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.mirror import Mirror
from hybrid_train.jobs import fetched_checkpoint
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.schema.problems import UserError
from tests.unit.checkpoint.test_mirror import FILES, SIZE, checkpoint, contents


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run with the checkpoints of steps 5 and 10, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    made = f"file://{tmp_path}/there/a"
    mirror = Mirror(made)
    owner, _ = mirror.claim(tmp_path / "run")
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    beside = [tmp_path / "run" / name for name in ("tokenizer", "metrics.jsonl")]
    for step in (5, 10):
        mirror.copy(checkpoint(tmp_path / "run", step), beside, owner)
    return made


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert folder_of(str(tmp_path), "checkpoint") == tmp_path
    assert folder_of("nowhere", "checkpoint") == Path("nowhere")  # whoever opens it says so


def test_of_a_run_the_newest_is_taken_and_a_named_one_if_it_is_named(
    url: str, tmp_path: Path
) -> None:
    newest = folder_of(url, "checkpoint")
    assert newest.is_relative_to(tmp_path / "cache" / "hybrid_train" / "checkpoints")
    assert contents(newest) == contents(layout.path_of(tmp_path / "run", 10))
    named = folder_of(f"{url}/checkpoints/step_00000005/", "checkpoint")
    assert contents(named) == contents(layout.path_of(tmp_path / "run", 5))
    run_dir = layout.locate(named).run_dir
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()
    assert not (run_dir / "metrics.jsonl").exists()  # it may be large, and nobody reads it


def test_two_that_ask_at_once_fetch_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    found: list[Path] = []
    with caplog.at_level(logging.INFO):
        asking = [
            threading.Thread(target=lambda: found.append(folder_of(url, "checkpoint")))
            for _ in range(4)
        ]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert sum("fetching step 10" in one.getMessage() for one in caplog.records) == 1


def test_a_copy_that_lost_its_position_is_fetched_anew(url: str) -> None:
    found = folder_of(url, "checkpoint")
    (found / "position.json").unlink()
    (found / FILES[0]).write_bytes(b"")
    shutil.move(found, found.with_name(found.name + ".partial"))
    assert folder_of(url, "checkpoint") == found
    assert (found / FILES[0]).stat().st_size == SIZE + 1
    assert (found / "position.json").is_file()


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fetched_checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=SIZE)
    )
    with pytest.raises(UserError, match=r"disk is full: the checkpoint of checkpoint.load"):
        folder_of(url, "checkpoint.load")


def test_what_is_not_there_is_refused_by_what_is(url: str) -> None:
    with pytest.raises(UserError, match="whole ones are step_00000005, step_00000010"):
        folder_of(f"{url}/checkpoints/step_00000007", "checkpoint")
    with pytest.raises(UserError, match="there is no whole checkpoint; give the URL of a run"):
        folder_of(f"{url}/b", "checkpoint")
