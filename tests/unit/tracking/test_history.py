"""The history of a run: events on disk, attempts made of them."""

from pathlib import Path

from hybrid_train.tracking import history


def begin(run_dir: Path, number: int, at: float) -> None:
    history.note(
        run_dir, history.ATTEMPT, at=at, attempt=number, step=5, processes=4, nodes=2,
        host="node1", job="17", restart=0,
    )  # fmt: skip


def test_an_attempt_without_an_end_is_running(tmp_path: Path) -> None:
    begin(tmp_path, 1, at=100.25)
    (attempt,) = history.attempts(history.read(tmp_path))
    assert (attempt.number, attempt.start, attempt.start_step) == (1, 100.25, 5)
    assert (attempt.processes, attempt.nodes, attempt.host, attempt.job) == (4, 2, "node1", "17")
    assert (attempt.outcome, attempt.end) == (history.RUNNING, None)


def test_an_end_belongs_to_the_attempt_of_its_number(tmp_path: Path) -> None:
    begin(tmp_path, 1, at=100)
    begin(tmp_path, 2, at=200)
    history.note(
        tmp_path, history.END, at=150, attempt=1, step=7, outcome=history.FAILED, kind="killed",
        cause="rank 1 was killed", ranks=[1],
    )  # fmt: skip
    first, second = history.attempts(history.read(tmp_path))
    assert (first.end, first.end_step, first.kind, first.ranks) == (150, 7, "killed", (1,))
    assert second.outcome == history.RUNNING


def test_a_line_that_was_cut_short_does_not_hide_the_others(tmp_path: Path) -> None:
    begin(tmp_path, 1, at=100)
    with (tmp_path / history.FILE_NAME).open("a") as file:
        file.write('{"time": "2026-01-01T00:0\n')
    begin(tmp_path, 2, at=200)
    assert [one.number for one in history.attempts(history.read(tmp_path))] == [1, 2]
