"""A checkpoint behind a URL is fetched once, whole or not at all, and then used as a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.mirror import Mirror
from tests.jobs.command import Finished, finish, metrics, start, train
from tests.jobs.s3_server import BUCKET, ignores_their_warnings, serve
from tests.jobs.test_checkpoint_url import require_equal

pytestmark = [ignores_their_warnings, pytest.mark.xdist_group("s3")]

SAVES = "checkpoint.interval=2"
MORE = "train.tokens=2560"  # ten steps of 256 tokens
HALF = "train.tokens=1280"


@dataclass(frozen=True)
class Parent:
    """A run, and its copy behind a URL."""

    run_dir: Path
    url: str
    files: Any
    folder: str  # as `files` calls it
    cache: Path
    words: tuple[str, ...]  # of the data, for whoever goes on

    def fetched(self) -> list[Path]:
        """List the whole checkpoints that were fetched."""
        return sorted(one.parent for one in self.cache.glob("*/checkpoints/step_*/position.json"))

    def start(self, run_dir: Path, *words: str, url: str = "", processes: int = 1) -> Finished:
        """Begin a run with a checkpoint there."""
        load = f"checkpoint.load={url or self.url}"
        return train(run_dir, *self.words, MORE, load, *words, processes=processes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of five steps, with the checkpoints of the fourth and the fifth."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    done = train(run_dir, f"data.folder={corpus}", HALF, SAVES)
    assert done.code == 0, done.err
    return run_dir


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def parent(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    trained: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Parent]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "hybrid_train" / "checkpoints"
    data = (f"data.folder={corpus}",)
    if request.param == "file":
        folder = f"{tmp_path}/there/runs/a"
        made = Parent(trained, f"file://{folder}", fsspec.filesystem("file"), folder, cache, data)
        copy(trained, made.url)
        yield made
        return
    with serve(monkeypatch) as server:
        # fsspec keeps a file system for a process, and this one the server of the test before.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        url = f"s3://{BUCKET}/runs/a"
        made = Parent(trained, url, server.files, f"{BUCKET}/runs/a", cache, data)
        copy(trained, url)
        yield made


def copy(run_dir: Path, url: str) -> None:
    """Copy a run as `checkpoint.url` does."""
    mirror = Mirror(url)
    owner, _ = mirror.claim(run_dir)
    names = ("config.yaml", "format.json", "tokenizer", "metrics.jsonl", "history.jsonl")
    for found in layout.complete(run_dir):
        mirror.copy(found, [run_dir / name for name in names], owner)


def test_a_run_that_begins_with_a_url_equals_one_that_begins_with_the_folder(
    parent: Parent, tmp_path: Path
) -> None:
    expected = train(
        tmp_path / "expected", *parent.words, MORE, f"checkpoint.load={parent.run_dir}"
    )
    assert expected.code == 0, expected.err
    actual = parent.start(tmp_path / "actual")
    assert actual.code == 0, actual.err
    (fetched,) = parent.fetched()
    assert fetched.name == "step_00000005"  # the newest
    assert "fetching step 5 " in actual.said
    assert str(fetched) in actual.said  # where it lies is said
    require_equal(tmp_path / "expected", tmp_path / "actual", 10)
    # What is here is not fetched again, a named one is, and weights alone may be taken.
    named = f"{parent.url}/checkpoints/step_00000004"
    again = parent.start(tmp_path / "again")
    assert again.code == 0, again.err
    assert "fetching" not in again.said
    other = parent.start(tmp_path / "other", "checkpoint.load_only=weights", url=named)
    assert other.code == 0, other.err
    assert "fetching step 4 " in other.said
    assert metrics(tmp_path / "other")[0]["step"] == 1
    assert [one.name for one in parent.fetched()] == ["step_00000004", "step_00000005"]


def test_a_fetch_that_was_cut_off_is_not_taken_and_goes_on(parent: Parent, tmp_path: Path) -> None:
    assert parent.start(tmp_path / "first").code == 0
    (whole,) = parent.fetched()
    half = whole.rename(whole.with_name(whole.name + ".partial"))
    (half / "position.json").unlink()
    (data,) = half.glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    kept = half / ".metadata"
    before = kept.stat().st_ino, kept.stat().st_mtime_ns
    second = parent.start(tmp_path / "second")
    assert second.code == 0, second.err
    assert parent.fetched() == [whole]
    kept = whole / kept.name
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before  # it was not fetched again
    assert (whole / data.name).read_bytes() == content
    require_equal(tmp_path / "first", tmp_path / "second", 10)


def test_another_run_behind_the_same_url_is_not_mistaken_for_what_was_fetched(
    parent: Parent, tmp_path: Path
) -> None:
    assert parent.start(tmp_path / "first").code == 0
    other = tmp_path / "other"
    done = train(other, *parent.words, HALF, "train.seed=7")
    assert done.code == 0, done.err
    copy(other, parent.url)
    second = parent.start(tmp_path / "second")
    assert second.code == 0, second.err
    assert "fetching step 5 " in second.said
    (fetched,) = parent.fetched()
    theirs = other / "checkpoints" / "step_00000005" / "checksums.json"
    assert (fetched / "checksums.json").read_bytes() == theirs.read_bytes()


def test_generate_convert_and_verify_take_a_url(parent: Parent, tmp_path: Path) -> None:
    prompt = ("prompt=the", "max_new_tokens=8", "runtime.device=cpu")
    expected = finish(start("generate", f"checkpoint={parent.run_dir}", *prompt))
    actual = finish(start("generate", f"checkpoint={parent.url}", *prompt))
    assert (actual.code, actual.out) == (0, expected.out), actual.err
    for name, source in (("one", parent.run_dir), ("other", parent.url)):
        done = finish(start("convert", f"export={source}", f"output={tmp_path / name}"))
        assert done.code == 0, done.err
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}
        for name in ("one", "other")
    )
    assert one
    assert one == other
    words = (f"hf={tmp_path / 'other'}", "logits=false")
    verified = finish(start("verify", f"checkpoint={parent.url}", *words))
    assert verified.code == 0, verified.err
    assert (actual.said + done.said + verified.said).count("fetching") == 1


def test_what_is_wrong_with_the_url_is_a_sentence(parent: Parent, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    nothing = parent.start(run_dir, url=f"{parent.url}/nothing")
    assert f"{parent.url}/nothing/config.yaml does not exist; checkpoint.load" in nothing.err
    gone = parent.start(run_dir, url=f"{parent.url}/checkpoints/step_00000003")
    assert "step_00000003: it is not whole there; whole ones are step_00000004, " in gone.err
    names = parent.files.find(f"{parent.folder}/checkpoints")
    name = next(one for one in names if "step_00000005" in one and one.endswith(".distcp"))
    content = bytearray(parent.files.cat_file(name))
    content[len(content) // 2] ^= 1
    parent.files.pipe_file(name, bytes(content))
    damaged = parent.start(run_dir)
    assert "step 5 is damaged there: " in damaged.err
    assert f"take another of {parent.url}/checkpoints/step_*" in damaged.err
    for one in (one for one in names if one.endswith("position.json")):
        parent.files.rm_file(one)
    none = parent.start(run_dir)
    assert "there is no whole checkpoint; give the URL of a run" in none.err
    unknown = parent.start(run_dir, url="nowhere://runs/a")
    assert "Protocol not known: nowhere" in unknown.err
    for refused in (nothing, gone, damaged, none, unknown):
        assert refused.code == 2
        assert "Traceback" not in refused.err
    assert parent.fetched() == []
    assert not run_dir.exists()
    if parent.url.startswith("s3:"):
        absent = parent.start(run_dir, url="s3://no-such-bucket/runs/a")
        assert absent.code == 2
        assert "there is no such bucket" in absent.err
        generate = finish(start("generate", "checkpoint=s3://no-such-bucket/runs/a", "prompt=a"))
        assert generate.code == 2
        assert "there is no such bucket; check checkpoint" in generate.err


@pytest.mark.slow
def test_two_processes_fetch_once(parent: Parent, tmp_path: Path) -> None:
    done = parent.start(tmp_path / "run", processes=2)
    assert done.code == 0, done.err
    assert done.said.count("fetching step 5 ") <= 1  # messages of the second process are not shown
    assert [one.name for one in parent.fetched()] == ["step_00000005"]
    assert metrics(tmp_path / "run")[0]["step"] == 6
