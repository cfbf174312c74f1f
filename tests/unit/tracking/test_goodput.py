"""Where the wall time of a run went: parts that are known by construction."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_train.schema.tracking import Tracking
from hybrid_train.tracking import history
from hybrid_train.tracking.goodput import Goodput, goodput
from hybrid_train.tracking.jsonl import JsonLines
from hybrid_train.tracking.trackers import build_trackers

START = 1_000_000.0


def events(folder: Path, *noted: tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
    for at, event, details in noted:
        history.note(folder, event, at=START + at, **details)
    return history.read(folder)


def begin(number: int, step: int) -> dict[str, Any]:
    return {
        "attempt": number, "step": step, "processes": 2, "nodes": 1, "host": "n1", "job": None,
        "restart": 0,
    }  # fmt: skip


def end(number: int, step: int, outcome: str) -> dict[str, Any]:
    return {
        "attempt": number, "step": step, "outcome": outcome, "kind": outcome, "cause": "",
        "ranks": [],
    }  # fmt: skip


def line(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "step_time_s": 2.0, "pause_s": 0.0, **more}


def measured(found: Goodput | None) -> dict[str, float]:
    assert found is not None
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    return dict(found.seconds)


def test_a_run_in_one_go_has_its_steps_its_pauses_and_a_rest(tmp_path: Path) -> None:
    noted = events(
        tmp_path,
        (0, "attempt", begin(1, 0)),
        (9, "skipped", {"step": 3}),
        (20, "end", end(1, 4, "finished")),
    )
    lines = [
        line(1),
        line(2, pause_s=3.0, validation_time_s=1.0),
        line(3),
        line(4, pause_s=2.0, save_time_s=1.5),
    ]
    found = goodput(noted, lines, START + 999)
    assert measured(found) == pytest.approx(
        {
            "productive": 6, "skipped": 2, "replayed": 0, "validation": 1, "saving": 1.5,
            "pauses": 2.5, "waiting": 0, "rest": 7,
        }
    )  # fmt: skip
    assert found is not None
    assert found.share == pytest.approx(6 / 20)
    assert found.unknown == ()


def test_what_a_kill_costs_is_told_apart(tmp_path: Path) -> None:
    noted = events(
        tmp_path,
        (0, "attempt", begin(1, 0)),
        (20, "end", end(1, 2, "failed")),
        (50, "attempt", begin(2, 2)),
        (51, "dropped", {"step": 2, "steps": 3, "seconds": 6.5}),
        (80, "end", end(2, 4, "finished")),
    )
    found = measured(goodput(noted, [line(n) for n in range(1, 5)], START + 999))
    assert found["productive"] == 8
    assert found["replayed"] == 6.5
    assert found["waiting"] == 30
    assert found["rest"] == pytest.approx(80 - 8 - 6.5 - 30)


def test_steps_before_a_rollback_do_not_count(tmp_path: Path) -> None:
    noted = events(
        tmp_path,
        (0, "attempt", begin(1, 0)),
        (9, "skipped", {"step": 6}),
        (9, "rolled back", {"step": 6, "to": 3, "first": 5}),
        (20, "end", end(1, 8, "finished")),
    )
    found = measured(goodput(noted, [line(n) for n in range(1, 9)], START))
    assert (found["productive"], found["skipped"]) == (10, 6)  # steps 4, 5 and 6 are undone


def test_steps_behind_the_checkpoint_of_a_run_that_died_do_not_count(tmp_path: Path) -> None:
    noted = events(tmp_path, (0, "attempt", begin(1, 0)), (20, "end", end(1, 3, "failed")))
    found = measured(goodput(noted, [line(n, pause_s=0.5) for n in range(1, 6)], START + 999))
    assert found["productive"] == 6
    assert found["replayed"] == 5


def test_a_run_that_goes_on_is_measured_up_to_now(tmp_path: Path) -> None:
    noted = events(tmp_path, (0, "attempt", begin(1, 0)))
    found = goodput(noted, [line(1), line(2)], START + 8)
    assert found is not None
    assert (found.wall_s, found.share) == (pytest.approx(8), pytest.approx(0.5))


def test_an_attempt_without_an_end_ends_before_the_next(tmp_path: Path) -> None:
    noted = events(
        tmp_path,
        (0, "attempt", begin(1, 0)),
        (10, "attempt", begin(2, 0)),
        (14, "end", end(2, 1, "finished")),
    )
    found = measured(goodput(noted, [line(1)], START + 999))
    assert found["waiting"] == 0
    assert found["rest"] == pytest.approx(12)


def test_what_older_files_do_not_tell_is_said(tmp_path: Path) -> None:
    noted = events(tmp_path, (0, "attempt", begin(1, 0)), (10, "end", end(1, 1, "finished")))
    found = goodput(noted, [{"step": 1, "step_time_s": 2.0}], START)
    assert found is not None
    assert "saving" not in found.seconds
    assert found.unknown == ("validation", "saving")
    assert "the files do not tell: validation, saving" in found.meaning("rest")


def test_without_a_history_nobody_knows_the_wall_time() -> None:
    assert goodput([], [line(1)], START) is None


def test_what_a_resume_drops_is_noted(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.log(step, {"step_time_s": 2.0, "pause_s": 0.25})
    log.close()
    for tracker in build_trackers(Tracking(), tmp_path, 3, {}):
        tracker.close()
    (event,) = history.read(tmp_path)
    assert (event["event"], event["step"], event["steps"], event["seconds"]) == (
        "dropped", 3, 2, 4.5
    )  # fmt: skip
    for tracker in build_trackers(Tracking(), tmp_path, 3, {}):
        tracker.close()
    assert len(history.read(tmp_path)) == 1  # nothing was there to drop


def test_a_run_of_the_first_second_has_no_share(tmp_path: Path) -> None:
    found = goodput(events(tmp_path, (0, "attempt", begin(1, 0))), [], START)
    assert found is not None
    assert found.share != found.share
