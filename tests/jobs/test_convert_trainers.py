"""A run goes to each of NVIDIA's trainers and comes back, from the command line."""

from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout
from tests.jobs.command import Finished, assert_equal_to_the_bit, finish, metrics, start, train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("convert")]
CPU = ("runtime=cpu", "runtime.threads=1")


def convert(*words: str) -> Finished:
    return finish(start("convert", *words))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder of the smallest model after two steps."""
    folder = tmp_path_factory.mktemp("trainers") / "run"
    done = train(folder, f"data.folder={corpus}", "train.tokens=512")
    assert done.code == 0, done.said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["megatron_lm", "bridge", "nemo"])
def test_a_run_that_went_there_and_back_trains_on_and_writes(
    run: Path, corpus: Path, tmp_path: Path, format: str
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    done = convert(f"export={run}", f"output={there}", f"format={format}")
    assert done.code == 0, done.said
    assert "optimizer's state stays behind" in done.said
    done = convert(f"import={there}", f"output={back}")
    assert done.code == 0, done.said
    found, before = layout.locate(back), layout.locate(run)
    assert found.position() == {key: before.position()[key] for key in ("step", "tokens")}
    on = (f"data.folder={corpus}", "train.tokens=512", "checkpoint.load_only=weights")
    for name, source in (("one", run), ("other", back)):
        done = train(tmp_path / name, *on, f"checkpoint.load={source}")
        assert done.code == 0, done.said
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "other")]
    assert losses[0] == losses[1]
    assert_equal_to_the_bit(tmp_path / "one", tmp_path / "other", 2)
    done = finish(start("generate", f"checkpoint={back}", "prompt=a", "max_new_tokens=3", *CPU))
    assert done.code == 0, done.said


def test_settings_that_have_no_meaning_are_refused(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    done = convert(f"import={run}", f"output={there}", "format=bridge")
    assert (done.code, "is that of an export" in done.said) == (2, True), done.said
    done = convert(f"export={run}", f"output={there}", f"tokenizer={run / 'tokenizer'}")
    assert (done.code, "an export takes that of the run" in done.said) == (2, True), done.said
    assert not there.exists()
