"""Runs with sources, blends, packing and phases: what they read, report, refuse and go on with."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from hybrid_train.checkpoint import layout
from hybrid_train.data.token_files import write_documents
from hybrid_train.tracking import history
from tests.jobs.command import TIMING, Finished, finish, metrics, start, train, untimed
from tests.jobs.kills import (
    STEP_TOKENS,
    VOCAB,
    compare,
    kill_once,
    phases,
    run_to_the_end,
    write_sources,
)
from tests.sampled import sampled

pytestmark = pytest.mark.xdist_group("phases")

STEPS = 20
ROUNDING = 28 * torch.finfo(torch.float32).eps  # as in test_other_layouts.py


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    return [*write_sources(folder), *phases(STEPS), "checkpoint.interval=3"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """The run in one go; what it read is in the file beside it."""
    folder = tmp_path_factory.mktemp("straight")
    run_to_the_end(folder / "run", folder / "trace", *settings, "checkpoint.keep=100")
    return folder / "run"


def test_each_phase_has_its_batch_its_rate_and_its_sources(straight: Path) -> None:
    lines = metrics(straight)
    assert [line["tokens"] for line in lines] == [STEP_TOKENS * n for n in range(1, STEPS + 1)]
    first, second = lines[: STEPS // 2], lines[STEPS // 2 :]
    assert {line["global_batch"] for line in first} == {4}
    assert {line["global_batch"] for line in second} == {2}
    assert {line["lr"] for line in second} == {1e-4}
    assert any("loss/pairs" in line for line in first)
    assert not any("loss/pairs" in line for line in second)


def test_losses_of_the_sources_make_up_that_of_the_batch(straight: Path) -> None:
    before: dict[str, float] = {}
    for line in metrics(straight):
        seen = {k.removeprefix("tokens/"): v for k, v in line.items() if k.startswith("tokens/")}
        drawn = {name: count - before.get(name, 0) for name, count in seen.items()}
        total = sum(drawn.values())
        assert 0.8 * STEP_TOKENS < total <= STEP_TOKENS  # the rest is padding
        parts = sum(line[f"loss/{name}"] * count for name, count in drawn.items() if count)
        assert parts / total == pytest.approx(line["loss"], rel=ROUNDING)
        before = seen


def test_validation_is_told_apart_too(straight: Path) -> None:
    last = metrics(straight)[-1]
    names = {"web", "code", "pairs"}
    assert {f"validation_loss/{name}" for name in names} <= last.keys()
    parts = [last[f"validation_loss/{name}"] for name in names]
    assert min(parts) < last["validation_loss"] < max(parts)


@pytest.mark.slow
def test_a_run_that_is_killed_reads_what_a_straight_one_reads(
    settings: list[str], straight: Path, tmp_path: Path
) -> None:
    run_dir, trace, chance = tmp_path / "run", tmp_path / "trace", random.Random(1)
    for _ in range(3):
        kill_once(run_dir, trace, chance, *settings)
    run_to_the_end(run_dir, trace, *settings)
    assert compare(straight, run_dir, straight.parent / "trace", trace) == 4 * 10 + 2 * 10


@pytest.mark.slow
def test_a_phase_may_have_another_layout(
    settings: list[str], straight: Path, tmp_path: Path
) -> None:
    listed = next(text for text in settings if text.startswith("train.phases="))
    moved = listed.replace("name: second", "name: second, tensor: 2")
    finished = train(tmp_path / "run", *settings, moved, "train.microbatch=1", processes=2)
    assert finished.code == 0, finished.err
    assert "going on under tensor=2, saved under data=2" in finished.said
    for line, reference in zip(metrics(tmp_path / "run"), metrics(straight), strict=True):
        assert line.keys() - TIMING == reference.keys() - TIMING
        # The room that test_processes.py gives, for the same reason.
        assert line["loss"] == pytest.approx(reference["loss"], abs=1e-3)
        assert line["tokens/code"] == reference["tokens/code"]


def stopped_at(straight: Path, run_dir: Path, step: int) -> Path:
    """Copy the run as it was when it had saved a step, and no later one."""
    shutil.copytree(straight, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return run_dir


def test_phases_to_come_may_change_and_those_begun_may_not(
    settings: list[str], straight: Path, tmp_path: Path
) -> None:
    run_dir = stopped_at(straight, tmp_path / "run", 6)
    listed = next(text for text in settings if text.startswith("train.phases="))
    begun = listed.replace("name: first", "name: first, global_batch: 8")
    refused = train(run_dir, *settings, begun)
    assert refused.code == 2
    assert "train.phases.0.global_batch: None there, 8 here" in refused.err
    to_come = listed.replace("code: 0.8", "code: 0.1, pairs: 0.7")
    went_on = train(run_dir, *settings, to_come)
    assert went_on.code == 0, went_on.err
    assert untimed(run_dir)[:10] == untimed(straight)[:10]
    assert "loss/pairs" in metrics(run_dir)[-1]


@pytest.mark.slow
def test_data_that_changed_is_refused_by_name_unless_it_is_accepted(
    settings: list[str], straight: Path, tmp_path: Path
) -> None:
    run_dir = stopped_at(straight, tmp_path / "run", 18)
    shutil.copytree(Path(_prefix(settings, "code")).parent, tmp_path / "data")
    moved = [text.replace(str(Path(_prefix(settings, "code")).parent), str(tmp_path / "data"))
             for text in settings]  # fmt: skip
    frozen = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        frozen.replace(str(Path(_prefix(settings, "code")).parent), str(tmp_path / "data"))
    )
    documents = [[*([7] * 70), 0]] * 200
    write_documents(tmp_path / "data" / "code", documents, vocab_size=VOCAB)
    refused = train(run_dir, *moved)
    assert refused.code == 2
    assert "source code, train:" in refused.err
    assert "source web" not in refused.err
    accepted = train(run_dir, *moved, "data.accept_changes=true")
    assert accepted.code == 0, accepted.err
    (noted,) = (event for event in history.read(run_dir) if event["event"] == "data changed")
    assert noted["step"] == 18
    assert "source code, train" in noted["changes"][0]


def _prefix(settings: list[str], source: str) -> str:
    listed = next(text for text in settings if text.startswith("data.sources="))
    return listed.split(f"{source}: {{train: [")[1].split("]")[0]


def show(run_dir: Path, step: int, *more: str) -> Finished:
    return finish(start("data", "show", f"run_dir={run_dir}", f"step={step}", *more))


@pytest.mark.parametrize("step", sampled([1, 9, 12], 12))
def test_data_show_prints_what_the_step_read(straight: Path, step: int) -> None:
    found = show(straight, step, "characters=100000")
    assert found.code == 0, found.err
    lines = metrics(straight)
    for source in ("web", "code"):
        before = lines[step - 2].get(f"tokens/{source}", 0) if step > 1 else 0
        labels = sum(
            int(line.rsplit(" ", 1)[1]) - int(line.split("tokens ")[1].split()[0]) - 1
            for line in found.out.splitlines()
            if f"/{source} document" in line
        )
        assert labels == lines[step - 1].get(f"tokens/{source}", 0) - before
    assert "w17" in found.out  # a word of the vocabulary


def test_data_show_says_which_steps_there_are(straight: Path) -> None:
    found = finish(start("data", "show", f"run_dir={straight}", "step=21", cold=True))
    assert found.code == 2
    assert "its steps go from 1 to 20" in found.err


@pytest.mark.slow
def test_a_run_without_sources_says_that_its_phases_cannot_mix_them(tmp_path: Path) -> None:
    listed = "[{name: a, blend: {web: 1}}, {name: b, start: 50%, blend: {web: 1, code: 2}}]"
    done = train(tmp_path / "run", f"train.phases={listed}")
    assert done.code == 0, done.said
    said = "the phases name sources (web, code), this run has none: all phases read the quickstart"
    assert done.said.count(said) == 1


@pytest.mark.slow
def test_a_complete_run_goes_on_in_a_phase_that_is_added(
    settings: list[str], straight: Path, tmp_path: Path
) -> None:
    run_dir = stopped_at(straight, tmp_path / "run", STEPS)
    listed = next(text for text in settings if text.startswith("train.phases="))
    end = STEPS * STEP_TOKENS
    more = listed.replace("}]", f"}}, {{name: third, start: {end}, sequence_length: 64}}]")
    finished = train(run_dir, *settings, more, f"train.tokens={end + 2 * 128}")
    assert finished.code == 0, finished.err
    lines = metrics(run_dir)
    assert lines[:STEPS] == metrics(straight)
    assert [line["tokens"] for line in lines[STEPS:]] == [end + 128, end + 256]


@pytest.mark.slow
def test_batches_that_an_objective_makes_go_on_over_phases_and_a_restart(
    corpus: Path, tmp_path: Path
) -> None:
    settings = ["objective.kind=tests.own_batches:Settings", f"data.folder={corpus}"]
    settings += ["train.phases=[{name: a},{name: b,start: 768}]", "schedule=constant"]
    settings += ["schedule.warmup_tokens=0", "train.validation_interval=0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = [
        train(whole, *settings, "train.tokens=1536"),
        train(stopped, *settings, "train.tokens=1024"),
        finish(start("resume", f"run_dir={stopped}", "train.tokens=1536")),
    ]
    assert [one.code for one in done] == [0, 0, 0], "".join(one.said for one in done)
    assert len(metrics(whole)) == 6
    assert losses(stopped) == losses(whole)
    made = [layout.locate(run_dir).position()["batches"]["made"] for run_dir in (whole, stopped)]
    assert made == [6 * 2, 6 * 2]  # microbatches: both phases, and both processes, count on


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]
