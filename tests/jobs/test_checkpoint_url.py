"""Checkpoints behind a URL: a run goes on from them alone, whatever network and store do."""

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
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
from tests.jobs.s3_server import BUCKET, KEYS, S3Server, ignores_their_warnings, serve

pytestmark = [ignores_their_warnings, pytest.mark.xdist_group("s3")]

URL = f"checkpoint.url=s3://{BUCKET}/runs/a"
STEPS = "train.tokens=2560"  # ten of 256 tokens
SAVES = "checkpoint.interval=2"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with serve(monkeypatch) as started:
        yield started


@dataclass(frozen=True)
class Store:
    """Where copies go: a folder behind a URL."""

    url: str
    files: Any
    folder: str  # as `files` calls it

    def steps(self) -> list[str]:
        """List the whole checkpoints."""
        self.files.invalidate_cache()
        found = self.files.find(f"{self.folder}/checkpoints")
        return sorted(name.split("/")[-2] for name in found if name.endswith("/position.json"))


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    if request.param == "file":
        folder = f"{tmp_path}/there/runs/a"
        yield Store(f"checkpoint.url=file://{folder}", fsspec.filesystem("file"), folder)
        return
    with serve(monkeypatch) as started:
        yield Store(URL, started.files, f"{BUCKET}/runs/a")


def steps(server: S3Server) -> list[str]:
    return Store(URL, server.files, f"{BUCKET}/runs/a").steps()


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


def test_a_run_that_goes_on_from_the_url_alone_equals_one_without_interruption(
    store: Store, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    whole = train(tmp_path / "whole", data, STEPS, SAVES)
    assert whole.code == 0, whole.err
    first = stopped(tmp_path / "first", 5, data, STEPS, SAVES, store.url)
    assert first.code == 128 + signal.SIGTERM, first.err
    there = store.steps()
    assert len(there) == 2  # checkpoint.keep
    assert there[-1] == checkpoints(tmp_path / "first")[-1]  # the end waited for the last copy
    shutil.rmtree(tmp_path / "first")
    second = train(tmp_path / "second", data, STEPS, SAVES, store.url)
    assert second.code == 0, second.err
    assert f"/second/checkpoints/{there[-1]}" in second.said
    require_equal(tmp_path / "whole", tmp_path / "second", 10)
    assert store.steps()[-1] == "step_00000010"
    kinds = [one.kind for one in history.attempts(history.read(tmp_path / "second"))]
    assert kinds == ["signal", "finished"]  # how the first ended came along
    for secret in KEYS.values():
        assert secret not in first.said + second.said
    assert not any(
        KEYS["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()
        for path in (tmp_path / "second").rglob("*")
        if path.is_file()
    )


def test_a_half_copied_checkpoint_is_left_out_and_a_damaged_one_falls_back(
    store: Store, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    command = (data, STEPS, SAVES, store.url, "checkpoint.keep=4", "checkpoint.async_save=false")
    whole = train(tmp_path / "whole", *command)
    assert whole.code == 0, whole.err
    *_, third, second, newest = store.steps()
    files, folder = store.files, f"{store.folder}/checkpoints"
    files.rm_file(f"{folder}/{newest}/position.json")  # as a copy that was cut off
    name = next(one for one in files.find(f"{folder}/{second}") if one.endswith(".distcp"))
    data_there = bytearray(files.cat_file(name))
    data_there[len(data_there) // 2] ^= 1
    files.pipe_file(name, bytes(data_there))
    address = store.url.partition("=")[2]
    again = train(tmp_path / "again", *command)
    assert again.code == 0, again.err
    assert f"fetching step {int(newest[5:])} " not in again.said
    assert f"step {int(second[5:])} at {address} is damaged: __0_0.distcp" in again.said
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
    assert steps(server)[-1] == "step_00000160"


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
    assert steps(server)[-1] == "step_00000040"


def test_a_run_goes_on_while_nothing_can_be_copied_and_copies_when_it_can(
    tmp_path: Path, corpus: Path
) -> None:
    run_dir, there = tmp_path / "run", tmp_path / "there"
    words = (f"data.folder={corpus}", "train.tokens=5120", "checkpoint.interval=5")
    words += (f"checkpoint.url=file://{there}/a", "checkpoint.url_patience_s=1")
    process = start(*arguments(run_dir, *words))
    wait_for_step(run_dir, 1)
    shutil.rmtree(there)
    there.write_text("no folder any more")
    ended = finish(process)
    assert ended.code == 2
    assert "the newest checkpoint was not copied" in ended.err
    assert "the same command copies it as soon as that is possible" in ended.err
    assert checkpoints(run_dir)[-1] == "step_00000020"
    assert {one["step"] for one in history.read(run_dir) if one["event"] == "copy failed"} >= {20}
    there.unlink()
    again = train(run_dir, *words)
    assert again.code == 0, again.err
    assert "is complete" in again.said
    assert (there / "a" / "checkpoints" / "step_00000020" / "position.json").is_file()
    for folder in (run_dir, there / "a"):  # whoever fetches it learns that, too
        (attempt,) = history.attempts(history.read(folder))
        assert attempt.outcome == history.FINISHED
        assert "the newest checkpoint was not copied" in attempt.cause


@pytest.mark.slow
def test_what_forbids_copies_is_a_sentence_before_the_first_step(
    server: S3Server, tmp_path: Path, corpus: Path
) -> None:
    data, run_dir = f"data.folder={corpus}", tmp_path / "run"
    absent = train(run_dir, data, "checkpoint.url=s3://no-such-bucket/a")
    assert absent.code == 2
    assert "s3://no-such-bucket/a" in absent.err
    assert "there is no such bucket; check that the bucket or folder is there" in absent.err
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
    store: Store, tmp_path: Path, corpus: Path
) -> None:
    data = f"data.folder={corpus}"
    assert train(tmp_path / "one", data, "train.tokens=512", store.url).code == 0
    other = train(tmp_path / "two", data, "train.tokens=512", "train.seed=7", store.url)
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
