"""Where checkpoints stand, which are whole, and what is said where there is none."""

import json
from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.schema.formats import CHECKPOINT, KEY
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
    assert layout.drop_partial(tmp_path) == [half]
    assert not half.exists()
    assert whole.exists()
    assert layout.drop_partial(tmp_path) == []


@pytest.mark.parametrize(("count", "kept"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_the_newest_are_kept(tmp_path: Path, count: int, kept: list[int]) -> None:
    for step in (2, 1, 3):
        checkpoint(tmp_path, step)
    layout.keep_newest(tmp_path, count)
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


def say_in(folder: Path, **said: object) -> None:
    path = folder / layout.POSITION
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def newer() -> dict[str, object]:
    return CHECKPOINT.stamp() | {"version": CHECKPOINT.version + 1, "written_by": "9.9.9"}


def test_a_checkpoint_without_a_number_is_of_the_first_format(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    (folder / layout.POSITION).write_text('{"step": 3, "tokens": 30, "source_tokens": {"a": 30}}')
    found = layout.locate(folder)
    assert found.position() == {"step": 3, "tokens": 30, "source_tokens": {"a": 30}}


def test_a_checkpoint_of_a_newer_format_is_refused_wherever_it_is_met(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    say_in(folder, **{KEY: newer()})
    for meet in (
        lambda: layout.locate(tmp_path),
        layout.complete(tmp_path)[0].position,
        layout.complete(tmp_path)[0].require_readable,
    ):
        with pytest.raises(UserError, match=r"by hybrid_train 9\.9\.9 \(checkpoint, format 3\)"):
            meet()


def test_a_format_that_a_bit_changed_is_left_to_the_checksums(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    layout.write_checksums(folder, {})
    say_in(folder, **{KEY: newer()})
    layout.locate(tmp_path)
    assert layout.damages(folder)[0].startswith(layout.POSITION)


def test_a_position_that_counts_sequences_is_refused_with_a_sentence(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    say_in(folder, consumed_sequences=12)
    with pytest.raises(UserError, match="consumed_sequences, as before 25 November 2026"):
        layout.locate(folder).position()
