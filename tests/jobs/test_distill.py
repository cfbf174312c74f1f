"""A run that learns from another one: by the command, resumed, killed, on another layout."""

import shutil
from pathlib import Path
from signal import SIGKILL

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.config import frozen
from tests.jobs.command import (
    Finished,
    assert_equal_to_the_bit,
    checkpoints,
    finish,
    metrics,
    signal_at_step,
    start,
    train,
)

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]
STEPS = 12
TOKENS = f"train.tokens={STEPS * 256}"


@pytest.fixture(scope="module")
def parent(long_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with two of its checkpoints, the newer one under the name of an older."""
    folder = tmp_path_factory.mktemp("distill") / "parent"
    shutil.copytree(long_run[0], folder)
    newer = sorted((folder / "checkpoints").iterdir())[-1]
    newer.rename(folder / "kept")
    return folder


def words(parent: Path, steady: tuple[str, ...]) -> tuple[str, ...]:
    own = ("objective=distill", f"objective.teacher={parent}", "checkpoint.interval=4")
    own += ("checkpoint.async_save=false",)  # a kill finds them written
    return (*steady, *own, TOKENS, "train.validation_interval=4", "train.seed=5")


@pytest.fixture(scope="module")
def whole(parent: Path, steady: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = tmp_path_factory.mktemp("distilled") / "whole"
    return run_dir, train(
        run_dir, *words(parent, steady), "checkpoint.keep=3", "runtime.peak_tflops=1"
    )


def test_the_forward_pass_of_a_teacher_counts_in_mfu(whole: Run) -> None:
    model = frozen.load(whole[0]).model
    assert model.vocab_size is not None
    student = counts.flops_per_token(model, model.vocab_size, 64)  # the teacher is of its shape
    for line in metrics(whole[0]):
        flops = line["mfu"] * 1e12 / line["tokens_per_s"]
        assert flops == pytest.approx(student.training + student.forward)


def test_a_student_comes_near_its_teacher(whole: Run) -> None:
    run_dir, finished = whole
    assert finished.code == 0, finished.err
    first, *_, last = metrics(run_dir)
    assert last["divergence"] < first["divergence"] / 2
    assert last["validation_agreement"] > 0.2
    assert "It is the divergence from the teacher; the cross-entropy is" in finished.out


@pytest.mark.slow
def test_a_killed_student_goes_on_with_the_very_teacher_that_it_began_with(
    whole: Run, parent: Path, steady: tuple[str, ...], tmp_path: Path
) -> None:
    given, run_dir = words(parent, steady), tmp_path / "killed"
    killed = signal_at_step(SIGKILL, 6, run_dir, *given)
    assert killed.code != 0
    assert "step_00000004" in checkpoints(run_dir)
    newer = shutil.move(parent / "kept", parent / "checkpoints" / "step_00000040")
    try:
        finished = train(run_dir, *given)
    finally:
        shutil.move(newer, parent / "kept")
    assert finished.code == 0, finished.err
    assert_equal_to_the_bit(run_dir, whole[0], STEPS)


@pytest.mark.slow
def test_a_student_goes_on_under_another_layout(
    whole: Run, parent: Path, steady: tuple[str, ...], tmp_path: Path
) -> None:
    given, run_dir = words(parent, steady), tmp_path / "moved"
    shutil.copytree(whole[0], run_dir)
    for step in (8, 12):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
    layout = ("parallel.pipeline=2", "model.pattern=ME|*-/*E", "train.microbatch=1")
    finished = train(run_dir, *given, *layout, processes=2)
    assert finished.code == 0, finished.err
    for mine, theirs in zip(metrics(run_dir), metrics(whole[0]), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_teacher_of_a_run_cannot_become_another_one(
    whole: Run, parent: Path, steady: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir, own = tmp_path / "again", tmp_path / "parent"
    shutil.copytree(parent, own)
    given = words(own, steady)
    assert train(run_dir, *given, "train.tokens=1024").code == 0
    sums = next((own / "checkpoints").iterdir()).parent / "step_00000030" / "checksums.json"
    sums.write_text(sums.read_text() + "\n")
    refused = train(run_dir, *given)
    assert refused.code != 0
    assert "is another checkpoint than the one that this run" in refused.err
    assert len(metrics(run_dir)) == 4


@pytest.mark.slow
def test_a_teacher_behind_a_url_is_fetched_and_the_very_step_again_where_it_is_gone(
    whole: Run,
    parent: Path,
    steady: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there, run_dir = tmp_path / "there", tmp_path / "child"
    shutil.copytree(parent, there)
    given = (*words(parent, steady), "checkpoint.keep=3", f"objective.teacher=file://{there}")
    first = train(run_dir, *given, "train.tokens=1024")
    assert first.code == 0, first.err
    shutil.rmtree(tmp_path / "cache" / "hybrid_train" / "checkpoints")
    shutil.move(there / "kept", there / "checkpoints" / "step_00000040")  # it has trained on
    finished = train(run_dir, *given)
    assert finished.code == 0, finished.err
    assert "fetching step 30" in finished.err
    assert_equal_to_the_bit(run_dir, whole[0], STEPS)
    own = (
        "objective.teacher=self",
        f"checkpoint.load=file://{there}",
        "checkpoint.load_only=weights",
    )
    kept = train(tmp_path / "kept", *words(parent, steady), *own, "train.tokens=1024")
    assert kept.code == 0, kept.err
    assert metrics(tmp_path / "kept")[0]["divergence"] < 1e-6


@pytest.mark.slow
def test_a_run_goes_on_with_its_teacher_in_another_folder(
    whole: Run, parent: Path, steady: tuple[str, ...], tmp_path: Path
) -> None:
    given, run_dir = words(parent, steady), tmp_path / "child"
    shutil.copytree(whole[0], run_dir)
    for step in (8, 12):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
    shutil.copytree(parent, tmp_path / "moved")
    finished = train(run_dir, *given, "checkpoint.keep=3", f"objective.teacher={tmp_path}/moved")
    assert finished.code == 0, finished.err
    assert "is the very checkpoint that this run learned from in" in finished.err
    assert_equal_to_the_bit(run_dir, whole[0], STEPS)
    text = (run_dir / "teachers.json").read_text()
    assert str(tmp_path / "moved") in text
    assert str(parent) not in text.replace(f"{tmp_path}/moved", "")


@pytest.mark.slow
def test_a_student_drawn_between_layers_goes_on_and_leaves_its_projections_behind(
    parent: Path, steady: tuple[str, ...], tmp_path: Path
) -> None:
    """The weight of the hidden states is that of the step before, also behind a resume."""
    given = (*words(parent, steady), "objective.hidden.layers=[1,4]", "objective.mtp=off")
    given += ("objective.hidden.teacher_layers=[2,4]",)
    runs = [tmp_path / "whole", tmp_path / "again"]
    assert train(runs[0], *given, "checkpoint.keep=3").code == 0
    shutil.copytree(*runs)
    for step in (8, 12):
        shutil.rmtree(runs[1] / "checkpoints" / f"step_{step:08d}")
    finished = train(runs[1], *given, "checkpoint.keep=3")
    assert finished.code == 0, finished.err
    assert_equal_to_the_bit(runs[1], runs[0], STEPS)
    assert all("hidden_loss" in line for line in metrics(runs[1]))
    onward = (*steady, f"checkpoint.load={runs[0]}", "checkpoint.load_only=weights", TOKENS)
    plain = train(tmp_path / "plain", *onward)
    assert plain.code == 0, plain.err
    assert "not in the model, dropped with their moments: hidden_projections" in plain.err
    exported = finish(start("convert", f"export={runs[0]}", f"output={tmp_path / 'exported'}"))
    assert exported.code == 0, exported.err
