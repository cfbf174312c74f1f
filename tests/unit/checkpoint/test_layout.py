"""Where checkpoints stand, which are whole, and what is said where there is none."""

from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout, retention
from hybrid_train.schema.problems import UserError


def checkpoint(run_dir: Path, step: int) -> Path:
    folder = layout.path_of(run_dir, step)
    folder.mkdir(parents=True)
    layout.write_position(folder, {"step": step, "tokens": 10 * step})
    return folder


def partial(run_dir: Path, step: int) -> Path:
    folder = checkpoint(run_dir, step)
    return folder.rename(folder.with_name(folder.name + layout.PARTIAL))


def test_latest_is_the_highest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):  # nine digits sort before eight by name
        checkpoint(tmp_path, step)
    assert [found.step for found in layout.complete(tmp_path)] == [5, 99_999_999, 100_000_000]
    found = layout.latest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000
    assert found.position() == {"step": 100_000_000, "tokens": 1_000_000_000}
    assert found.run_dir == tmp_path


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"step": "2"}', '{"step": 2.5}', '{"source_tokens": {"web": null}}']
)
def test_a_damaged_position_is_named(tmp_path: Path, text: str) -> None:
    folder = checkpoint(tmp_path, 3)
    (folder / layout.POSITION).write_text(text)
    with pytest.raises(UserError, match=r"position\.json is damaged"):
        layout.locate(folder).position()


def test_partial_and_foreign_folders_are_never_found(tmp_path: Path) -> None:
    partial(tmp_path, 7)
    (tmp_path / "checkpoints" / "step_00000008").mkdir()  # without a position
    (tmp_path / "checkpoints" / "step_best").mkdir()
    assert layout.complete(tmp_path) == []
    assert layout.latest(tmp_path) is None


def test_partial_folders_are_dropped_and_named(tmp_path: Path) -> None:
    whole, half = checkpoint(tmp_path, 6), partial(tmp_path, 7)
    assert retention.drop_partial(tmp_path) == [half]
    assert not half.exists()
    assert whole.exists()
    assert retention.drop_partial(tmp_path) == []


@pytest.mark.parametrize(("count", "kept"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_the_newest_are_kept(tmp_path: Path, count: int, kept: list[int]) -> None:
    for step in (2, 1, 3):
        checkpoint(tmp_path, step)
    retention.keep_newest(tmp_path, count)
    assert [found.step for found in layout.complete(tmp_path)] == kept


def test_a_run_folder_means_its_latest_and_a_checkpoint_itself(tmp_path: Path) -> None:
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert layout.locate(tmp_path).path == newer
    assert layout.locate(older).path == older


def test_relative_paths_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path, 1)
    monkeypatch.chdir(folder)
    assert layout.locate(Path()).path == folder


@pytest.mark.parametrize(
    ("prepare", "path", "words"),
    [
        (lambda run: None, "nowhere", "nowhere does not exist; give a run folder"),
        (lambda run: None, ".", "neither a complete step_"),
        (lambda run: partial(run, 3), "checkpoints/step_00000003.partial", "was never finished"),
        (lambda run: partial(run, 3), ".", "neither a complete step_"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, prepare: object, path: str, words: str
) -> None:
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        layout.locate(tmp_path / path)
