"""A run with a mask is the run of the child that is cut out, step by step, as commands."""

import json
import shutil
from pathlib import Path

import pytest

from hybrid_train.config import frozen
from hybrid_train.jobs import cli
from tests.jobs.command import Finished, train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow, pytest.mark.xdist_group("mask")]
CUT = "model: {hidden_size: 48}, share: 0.6, depth: {drop: [2]}, narrowest: 0.3"
MODEL = "model.pattern=MEME*-/ME"


class Runs:
    """A parent, its ranking, a child that was cut out of it, and runs that begin with them."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self.words = (f"data.folder={corpus}", "train.tokens=1024", "schedule=constant")
        assert self.train("parent", MODEL).code == 0

    def train(self, name: str, *overrides: str) -> Finished:
        return train(self.folder / name, *self.words, *overrides)

    def masked(self, name: str, ranking: str, *overrides: str) -> Finished:
        edit = f"edits=[{{kind: mask, ranking: {self.folder / ranking}, {CUT}}}]"
        return self.train(name, MODEL, edit, *overrides)

    def begins_with(self, name: str) -> tuple[str, ...]:
        return (f"checkpoint.load={self.folder / name}", "checkpoint.load_only=weights")

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Runs:
    made = Runs(tmp_path_factory.mktemp("mask"), corpus)
    parent, ranking, child = (made.folder / name for name in ("parent", "ranking", "child"))
    few = ("rows=4", "sequence_length=32", "runtime=cpu", "runtime.threads=1")
    assert cli.main(["importance", f"checkpoint={parent}", f"output={ranking}", *few]) == 0
    cut = ("model.hidden_size=48", "share=0.6", "depth.drop=[2]", "narrowest=0.3")
    words = [f"checkpoint={parent}", f"ranking={ranking}", f"output={child}"]
    assert cli.main(["prune", *words, *cut]) == 0
    return made


def test_a_masked_run_is_the_run_of_the_child(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    done = runs.masked("masked", "ranking", *runs.begins_with("parent"))
    assert done.code == 0, done.said
    model = frozen.load(runs.folder / "child").model
    sizes = [f"model.pattern={model.pattern}", f"model.hidden_size={model.hidden_size}"]
    done = runs.train("cut", *sizes, *runs.begins_with("child"))
    assert done.code == 0, done.said
    steps = list(zip(runs.metrics("masked"), runs.metrics("cut"), strict=True))
    assert len(steps) >= 4
    for masked, cut in steps:
        for name in ("loss", "grad_norm", "mtp_1_loss", "moe_aux_loss"):
            assert (name in masked) == (name in cut), name
            if name in masked:
                assert masked[name] == pytest.approx(cut[name], rel=2e-5), name
    texts = []
    for name in ("masked", "cut", "parent"):
        words = [f"checkpoint={runs.folder / name}", "runtime=cpu", "runtime.threads=1"]
        capsys.readouterr()
        asked = ("prompt=import os", "max_new_tokens=24", "ignore_end=true")
        assert cli.main(["generate", *words, *asked]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_it_goes_on_by_its_own_copy_of_the_ranking(runs: Runs) -> None:
    shutil.copytree(runs.folder / "ranking", runs.folder / "gone")
    words = runs.begins_with("parent")
    done = runs.masked("again", "gone", *words, "train.tokens=512")
    assert done.code == 0, done.said
    shutil.rmtree(runs.folder / "gone")
    done = runs.masked("again", "gone", *words)
    assert done.code == 0, done.said
    assert len(runs.metrics("again")) == len(runs.metrics("parent"))


def test_a_mask_by_a_ranking_of_another_checkpoint_is_refused(runs: Runs) -> None:
    done = runs.masked("other", "ranking", *runs.begins_with("child"))
    assert done.code != 0
    assert "is another checkpoint" in done.said or "model" in done.said
    done = runs.masked("new", "ranking")
    assert done.code != 0
    assert "checkpoint.load = null: must be the checkpoint" in done.said
    assert not (runs.folder / "new").exists() or not (runs.folder / "new/metrics.jsonl").exists()


def test_a_mask_that_is_no_child_is_refused_where_it_stands(runs: Runs) -> None:
    done = runs.train("word", MODEL, "edits=[mask]", *runs.begins_with("parent"))
    assert done.code != 0
    assert "edits.0.share = null: must be set, or budget" in done.said
    edit = "edits=[{kind: mask, mtp: drop}]"
    done = runs.train("drop", MODEL, edit, *runs.begins_with("parent"))
    assert done.code != 0
    assert "edits.0.mtp = drop: must be keep: objective next_token trains" in done.said
