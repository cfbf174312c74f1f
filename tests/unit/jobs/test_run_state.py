"""What a run folder tells about its run."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from hybrid_train.jobs import report
from hybrid_train.jobs.run_state import look
from hybrid_train.schema.problems import UserError
from tests.unit.jobs.synthetic_run import STEP_S, make

START = 1_700_000_000.0


def silent_since(folder: Path, moment: float) -> Path:
    """Give every file of a run the age that it would have."""
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))
    return folder


def test_a_finished_run_is_finished_whatever_the_clock_says(tmp_path: Path) -> None:
    state = look(make(tmp_path, steps=30, start=START))
    assert (state.state, state.step, state.progress) == ("finished", 30, 1.0)
    assert state.seconds_left is None
    assert [one.number for one in state.attempts] == [1, 2, 3]
    assert [event["event"] for event in state.events] == ["skipped"]


@pytest.mark.parametrize("outcome", ["failed", "stopped"])
def test_how_the_last_attempt_ended_is_the_state(tmp_path: Path, outcome: str) -> None:
    state = look(make(tmp_path, steps=30, start=START, outcome=outcome))
    assert state.state == outcome
    assert state.why == state.attempts[-1].cause != ""


def test_a_run_without_an_end_runs_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=30, start=START, attempts=1, outcome=None)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"tokens: '{30 * 256}'", f"tokens: '{60 * 256}'"))
    silent_since(folder, START + 25)
    running = look(folder, now=START + 40)
    assert running.state == "running"
    assert running.silent_s == pytest.approx(15)
    assert running.seconds_left == pytest.approx(30 * STEP_S)
    assert running.goodput is not None
    assert running.goodput.wall_s == pytest.approx(40)
    dead = look(folder, now=START + 4000)
    assert (dead.state, dead.seconds_left) == ("no heartbeat", None)
    assert dead.why.startswith("for 1h06m; a step took 0.5 s")
    assert dead.goodput is not None
    assert dead.goodput.wall_s == pytest.approx(25)  # nobody knows of more


def test_a_run_whose_process_is_gone_has_failed(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=30, start=time.time() - 20, attempts=1, outcome=None)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"tokens: '{30 * 256}'", f"tokens: '{60 * 256}'"))
    gone = subprocess.Popen(["true"])
    gone.wait()
    me = {"host": socket.gethostname(), "pid": gone.pid, "started": "1", "job": None}
    (folder / "attempts").mkdir()
    (folder / "attempts" / "alive.json").write_text(json.dumps(me))
    state = look(folder)
    assert state.state == "failed"
    assert "killed, without a word" in state.why
    me = {"host": "another", "pid": gone.pid, "started": "1", "job": None}
    (folder / "attempts" / "alive.json").write_text(json.dumps(me))
    assert look(folder).state == "running"  # nobody here can know


def test_slow_steps_give_a_run_more_time(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=3, start=START, attempts=1, outcome=None)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step_time_s": 0.5', '"step_time_s": 90.0'))
    silent_since(folder, START + 25)
    assert look(folder, now=START + 1500).state == "running"
    assert look(folder, now=START + 2500).state == "no heartbeat"


def test_a_submitted_run_has_not_started(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=3, start=START)
    (folder / "metrics.jsonl").unlink()
    (folder / "history.jsonl").unlink()
    state = look(folder)
    assert (state.state, state.step, state.goodput) == ("not started", 0, None)


def test_a_run_from_before_there_was_a_history_is_judged_by_its_tokens(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=30, start=time.time())
    (folder / "history.jsonl").unlink()
    assert look(folder).state == "finished"


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder: it has no config"):
        look(tmp_path)
    (tmp_path / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="yaml is damaged"):
        look(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 31, "lo\x00\n',
        b'\xff\xfe{"step": 31}\n',
        b"[31]\n",
        b'{"loss": 2.0}\n',
        b'{"step": "31", "tokens": 7936}\n',
        b'{"step": 31, "tokens": null}\n',
        b'{"step": 31, "tokens": 7936, "loss": "2"}\n',
    ],
    ids=repr,
)
def test_a_damaged_line_of_metrics_is_named(line: bytes, tmp_path: Path) -> None:
    folder = make(tmp_path, steps=30, start=START)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 31 is damaged: "):
        look(folder)


@pytest.mark.parametrize(
    "line",
    [
        b'\xff\xfe{"event": "end"}\n',
        b'{"event": "attempt", "time": "yesterday", "attempt": 9, "step": 0}\n',
        b'{"event": "attempt", "time": "2026-01-01T00:00:00Z"}\n',
        b'{"event": "end", "time": "2026-01-01T00:00:00Z", "attempt": 3}\n',
        b'{"time": 5, "event": ["end"]}\n',
        b"\x00\x00\x00\n",
    ],
    ids=repr,
)
def test_a_damaged_line_of_the_history_is_left_out(line: bytes, tmp_path: Path) -> None:
    folder = make(tmp_path, steps=30, start=START)
    before = look(folder, now=START)
    with (folder / "history.jsonl").open("ab") as file:
        file.write(line)
    after = look(folder, now=START)
    assert (after.attempts, after.events) == (before.attempts, before.events)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"train: 3\n", None),  # of another version, or another program
        (b"train: {tokens: [1]}\nmodel: M\n", None),
        (b"a: [\xff", "is not UTF-8"),
        (b"a: [", "is damaged"),
        (b"", "is damaged: it holds no settings"),
    ],
    ids=repr,
)
def test_a_config_of_another_kind_is_read_or_refused(
    config: bytes, words: str | None, tmp_path: Path
) -> None:
    folder = make(tmp_path, steps=30, start=START)
    (folder / "config.yaml").write_bytes(config)
    if words is None:
        state = look(folder)
        assert (state.step, state.total_tokens) == (30, None)
        assert report.page_of_run(state).startswith("<!doctype html>")
    else:
        with pytest.raises(UserError, match=words):
            look(folder)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        look(tmp_path / "nowhere")
