"""Traces of some steps of a run, and what is said where there is nothing to trace."""

import gzip
import json
from pathlib import Path

import pytest

from tests.jobs.command import train

pytestmark = pytest.mark.xdist_group("train")


def test_a_trace_holds_the_steps_that_were_asked_for(
    tmp_path: Path, steady: tuple[str, ...]
) -> None:
    done = train(
        tmp_path, *steady, "train.tokens=2560", "profile=torch", "profile.start=4",
        "profile.steps=2", "profile.snapshot=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "there is no record of memory on a CPU" in done.said
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_4_to_5_rank_0.json.gz"
    assert f"trace of steps   {path}" in done.out  # in the summary
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = [one for one in events if str(one.get("name")).startswith("train step ")]
    assert sorted(one["name"] for one in steps) == ["train step 4", "train step 5"]
    for step in steps:  # each has products of matrices within it
        begin, end = step["ts"], step["ts"] + step["dur"]
        within = [one for one in events if one.get("ts") and begin <= one["ts"] <= end]
        assert any(one["name"] == "aten::mm" for one in within)


@pytest.mark.slow
def test_a_run_that_is_past_the_steps_says_so(tmp_path: Path, steady: tuple[str, ...]) -> None:
    first = train(tmp_path, *steady, "train.tokens=1280")
    assert first.code == 0, first.err
    done = train(tmp_path, *steady, "train.tokens=2560", "profile=torch", "profile.start=2")
    assert done.code == 0, done.err
    assert "profile: steps 2 to 4 are over" in done.said
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("profile=torch", "profile.ranks=[1]"), "the run has 1 process, the last is 0"),
        (("profile=nsys",), "torch sees none; profile=torch traces a CPU too"),
    ],
    ids=["rank", "nsys"],
)
def test_what_cannot_be_traced_is_refused(
    tmp_path: Path, steady: tuple[str, ...], settings: tuple[str, ...], words: str
) -> None:
    done = train(tmp_path, *steady, "train.tokens=1280", *settings)
    assert done.code == 2
    assert words in done.err
