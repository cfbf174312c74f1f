"""A URL for checkpoints is refused if it is no address, or belongs to another run."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.mirror import Mirror
from hybrid_train.config import frozen
from hybrid_train.config.compose import compose
from hybrid_train.jobs import mirrored_run
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.problems import UserError, collect
from hybrid_train.schema.train import TrainJob


@pytest.fixture
def url() -> Iterator[str]:
    folder = uuid.uuid4().hex
    yield f"memory://{folder}/a"
    if fsspec.filesystem("memory").exists(f"/{folder}"):
        fsspec.filesystem("memory").rm(f"/{folder}", recursive=True)


def job(run_dir: Path, url: str, *overrides: str) -> TrainJob:
    words = ["experiment=tiny_cpu", f'run_dir="{run_dir}"', f'checkpoint.url="{url}"']
    return compose("train", [*words, *overrides])


def leave_a_run(url: str, run_dir: Path, tokens: int = 256) -> None:
    """Put a run behind a URL: its config, and a checkpoint without tensors."""
    frozen.freeze(job(run_dir, url), run_dir)
    found = layout.Found(layout.path_of(run_dir, 1), 1)
    found.path.mkdir(parents=True)
    layout.write_position(found.path, {"step": 1, "tokens": tokens, "source_tokens": {}})
    layout.write_checksums(found.path, {})
    mirror = Mirror(url)
    owner, _ = mirror.claim(run_dir)
    mirror.copy(found, [run_dir / "config.yaml", run_dir / "format.json"], owner)


@pytest.mark.parametrize("url", ["runs/a", "s3://", "s3:/bucket/a", "://bucket", "s3:///"])
def test_what_is_no_address_breaks_a_rule(url: str) -> None:
    assert [problem.path for problem in collect(Checkpoint(url=url))] == ["url"]


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/runs/a", "file:///tmp/a", None])
def test_what_is_an_address_breaks_none(url: str | None) -> None:
    assert list(collect(Checkpoint(url=url))) == []


def test_a_url_of_the_same_run_is_taken_and_settings_that_may_change_are_free(
    url: str, tmp_path: Path
) -> None:
    leave_a_run(url, tmp_path / "there")
    mirrored_run.require_usable(job(tmp_path / "here", url, "checkpoint.keep=7"))
    assert not (tmp_path / "here").exists()


def test_a_url_of_another_run_is_refused_by_what_differs(url: str, tmp_path: Path) -> None:
    leave_a_run(url, tmp_path / "there")
    with pytest.raises(UserError, match="belongs to a run with another config") as caught:
        mirrored_run.require_usable(job(tmp_path / "here", url, "train.seed=7"))
    assert "train.seed: 1234 there, 7 here" in str(caught.value)
    assert url in str(caught.value)


def test_a_url_under_which_no_checkpoint_became_whole_may_become_that_of_another_run(
    url: str, tmp_path: Path
) -> None:
    leave_a_run(url, tmp_path / "there")
    Mirror(url).set_aside(1)
    mirrored_run.require_usable(job(tmp_path / "here", url, "train.seed=7"))


def test_a_protocol_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere://bucket/a: .*Protocol not known"):
        mirrored_run.require_usable(job(tmp_path, "nowhere://bucket/a"))
