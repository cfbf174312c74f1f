"""Checkpoints behind a URL: a run goes on from them alone, whatever network and store do."""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid_train.tracking import history
from tests.jobs.command import (
    TIMEOUT_S,
    Finished,
    arguments,
    checkpoints,
    finish,
    last_step,
    start,
    tensors,
    train,
    untimed,
)
from tests.jobs.s3_server import BUCKET, KEYS, S3Server, ignores_their_warnings, needs_s3, serve

pytestmark = [needs_s3, ignores_their_warnings, pytest.mark.xdist_group("s3")]

URL = f"checkpoint.url=s3://{BUCKET}/runs/a"
STEPS = "train.tokens=2560"  # ten of 256 tokens
SAVES = "checkpoint.interval=2"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with serve(monkeypatch) as started:
        yield started


def stopped(run_dir: Path, step: int, *overrides: str, processes: int = 1) -> Finished:
    """Train until a step is over, then have the run save and stop."""
    process = start(*arguments(run_dir, *overrides), processes=processes)
    wait_for_step(run_dir, step)
    process.send_signal(signal.SIGTERM)
    return finish(process)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def require_equal(one: Path, other: Path, step: int) -> None:
    assert untimed(one) == untimed(other)
    expected, actual = tensors(one, step), tensors(other, step)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.slow
def test_a_run_that_goes_on_from_the_url_alone_equals_one_without_interruption(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    whole = train(tmp_path / "whole", data, STEPS, SAVES)
    assert whole.code == 0, whole.err
    first = stopped(tmp_path / "first", 5, data, STEPS, SAVES, URL)
    assert first.code == 128 + signal.SIGTERM, first.err
    there = server.steps("runs/a")
    assert len(there) == 2  # checkpoint.keep
    assert there[-1] == checkpoints(tmp_path / "first")[-1]  # the end waited for the last copy
    shutil.rmtree(tmp_path / "first")
    second = train(tmp_path / "second", data, STEPS, SAVES, URL)
    assert second.code == 0, second.err
    assert f"/second/checkpoints/{there[-1]}" in second.said
    require_equal(tmp_path / "whole", tmp_path / "second", 10)
    assert server.steps("runs/a")[-1] == "step_00000010"
    kinds = [one.kind for one in history.attempts(history.read(tmp_path / "second"))]
    assert kinds == ["signal", "finished"]  # how the first ended came along
    for secret in KEYS.values():
        assert secret not in first.said + second.said
    assert not any(
        KEYS["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()
        for path in (tmp_path / "second").rglob("*")
        if path.is_file()
    )


@pytest.mark.slow
def test_a_half_copied_checkpoint_is_left_out_and_a_damaged_one_falls_back(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    command = (data, STEPS, SAVES, URL, "checkpoint.keep=4", "checkpoint.async_save=false")
    whole = train(tmp_path / "whole", *command)
    assert whole.code == 0, whole.err
    *_, third, second, newest = server.steps("runs/a")
    files, folder = server.store(), f"{BUCKET}/runs/a/checkpoints"
    files.rm_file(f"{folder}/{newest}/position.json")  # as a copy that was cut off
    name = next(one for one in files.find(f"{folder}/{second}") if one.endswith(".distcp"))
    data_there = bytearray(files.cat_file(name))
    data_there[len(data_there) // 2] ^= 1
    files.pipe_file(name, bytes(data_there))
    again = train(tmp_path / "again", *command)
    assert again.code == 0, again.err
    assert f"fetching step {int(newest[5:])} " not in again.said
    assert f"step {int(second[5:])} at s3://{BUCKET}/runs/a is damaged: __0_0.distcp" in again.said
    assert f"/again/checkpoints/{third}" in again.said
    events = history.read(tmp_path / "again")
    assert [one["step"] for one in events if one["event"] == "fallback"] == [int(second[5:])]
    require_equal(tmp_path / "whole", tmp_path / "again", 10)


@pytest.mark.slow
def test_a_network_that_is_gone_for_a_while_stops_no_step_and_all_is_copied_afterwards(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (f"data.folder={corpus}", "train.tokens=40960", "checkpoint.interval=10", URL)
    process = start(*arguments(run_dir, *words))
    wait_for_step(run_dir, 25)
    server.stop()
    wait_for_step(run_dir, 75)  # saves, with nobody to copy them to
    time.sleep(5)
    server.start()
    ended = finish(process)
    assert ended.code == 0, ended.err
    assert ended.said.count("cannot be reached") == 1
    assert ended.said.count("is reached again, after") == 1
    assert server.steps("runs/a")[-1] == "step_00000160"


@pytest.mark.slow
def test_a_network_that_stays_away_is_told_and_the_same_command_copies_later(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (f"data.folder={corpus}", "train.tokens=10240", "checkpoint.interval=10", URL)
    process = start(*arguments(run_dir, *words, "checkpoint.url_patience_s=1"))
    wait_for_step(run_dir, 15)
    server.stop()
    ended = finish(process)
    assert ended.code == 2
    assert "the newest checkpoint was not copied" in ended.err
    assert "the same command copies it as soon as that is possible" in ended.err
    assert checkpoints(run_dir)[-1] == "step_00000040"
    assert any(one["event"] == "copy failed" for one in history.read(run_dir))
    server.start()
    again = train(run_dir, *words)
    assert again.code == 0, again.err
    assert server.steps("runs/a")[-1] == "step_00000040"


def test_what_forbids_copies_is_a_sentence_before_the_first_step(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    data, run_dir = f"data.folder={corpus}", tmp_path / "run"
    absent = train(run_dir, data, "checkpoint.url=s3://no-such-bucket/a")
    assert absent.code == 2
    assert "s3://no-such-bucket/a" in absent.err
    assert "does not exist; check that the bucket or folder is there" in absent.err
    server.check_credentials()
    denied = train(run_dir, data, URL)
    assert denied.code == 2
    assert f"s3://{BUCKET}/runs/a" in denied.err
    assert "may not be written" in denied.err
    assert "check the credentials" in denied.err
    for refused in (absent, denied):
        assert "Traceback" not in refused.err
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in refused.said
    assert last_step(run_dir) == 0


@pytest.mark.slow  # the driver has tries of its own
def test_a_server_that_is_not_there_is_a_sentence(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    server.stop()
    nobody = train(tmp_path / "run", f"data.folder={corpus}", URL)
    server.start()
    assert nobody.code == 2
    assert f"cannot write s3://{BUCKET}/runs/a" in nobody.err
    assert "(3 tries); check the address and the network" in nobody.err
    assert "Traceback" not in nobody.err


def test_the_url_of_another_run_is_refused_by_what_differs(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    assert train(tmp_path / "one", data, "train.tokens=512", URL).code == 0
    other = train(tmp_path / "two", data, "train.tokens=512", "train.seed=7", URL)
    assert other.code == 2
    assert "train.seed: 1234 there, 7 here" in other.err
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_go_on_from_the_url_alone(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    words = (f"data.folder={corpus}", STEPS, SAVES)
    whole = train(tmp_path / "whole", *words, processes=2)
    assert whole.code == 0, whole.err
    assert stopped(tmp_path / "first", 5, *words, URL, processes=2).code != 0
    shutil.rmtree(tmp_path / "first")
    second = train(tmp_path / "second", *words, URL, processes=2)
    assert second.code == 0, second.err
    require_equal(tmp_path / "whole", tmp_path / "second", 10)
