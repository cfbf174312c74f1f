"""The job importance from its command line to a ranking, alone and on two processes."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import layers
from hybrid_train.checkpoint import layout
from hybrid_train.compression import ranking
from hybrid_train.config import frozen
from hybrid_train.jobs import cli
from tests.jobs.command import finish, start, train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("importance")]
Importance = Callable[..., int]
FEW = ("rows=6", "sequence_length=32", "runtime=cpu", "runtime.threads=1")
SECONDS = 60  # to end all ranks on a busy machine, start included; a collective waits for minutes


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("importance") / "parent"
    done = train(run_dir, f"data.folder={corpus}", "train.tokens=512", "model.pattern=ME*-/ME")
    assert done.code == 0, done.said
    return run_dir


@pytest.fixture
def importance(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Importance:
    """Calls the job with overrides; the ranking is in tmp_path/ranking."""
    capsys.readouterr()

    def call(*overrides: str) -> int:
        output = f"output={tmp_path / 'ranking'}"
        return cli.main(["importance", f"checkpoint={parent}", output, *FEW, *overrides])

    return call


def test_every_axis_that_can_be_cut_has_scores_of_its_size(
    importance: Importance, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("layers=[cosine,hidden_nmse,loss]", "iterative=2", "blocks=[2,3]", "layer_rows=2")
    assert importance(*asked) == 0
    found, model = ranking.read(tmp_path / "ranking"), frozen.load(parent).model
    assert found.hidden.shape == (model.hidden_size,)
    assert len({float(one) for one in found.hidden}) > 1
    depths = set()
    for layer in layers(model):
        depths.add(layer.depth)
        sizes = layer.sizes
        shapes = {
            Axis.ssm_heads: (sizes.ssm_heads, sizes.ssm_head_dim),
            Axis.expert_ffn: (sizes.experts, sizes.expert_ffn),
        }
        for axis in CHOSEN[layer.letter]:
            if axis is Axis.ssm_head_dim or not sizes.along(axis):
                continue  # it follows from the heads, or is not there
            scores = found.of(layer, axis)
            assert scores.shape == shapes.get(axis, (sizes.along(axis),))
            assert (scores >= 0).all()
            assert scores.min() < scores.max(), (layer.prefix, axis)  # not all alike
    assert depths == {0, 1}  # MTP blocks, too
    for metric in ("cosine", "hidden_nmse", "loss", "hidden_nmse_iterative", "loss_iterative"):
        assert found.layers(metric).shape == (4,)
    assert found.blocks("loss").shape == (4, 4)
    header = found.header
    assert (header.rows, header.sequence_length, header.seed) == (6, 32, 1234)
    assert header.checksum == layout.digest_of(layout.locate(parent).path)
    shown = capsys.readouterr().out
    assert [line.split()[:2] for line in shown.splitlines()[1:5]] == [
        ["1", "M"], ["2", "E"], ["3", "*"], ["4", "-"]
    ]  # fmt: skip
    assert f"hybrid-train prune checkpoint={parent} ranking={tmp_path / 'ranking'}" in shown


def test_the_rows_follow_from_the_seed_alone(importance: Importance, tmp_path: Path) -> None:
    found = {}
    for name, words in {
        "a": (), "b": ("microbatch=4",), "c": ("seed=5",)
    }.items():  # fmt: skip
        assert importance(f"output={tmp_path / name}", *words) == 0
        found[name] = ranking.read(tmp_path / name).hidden
    np.testing.assert_allclose(found["a"], found["b"], rtol=1e-5)
    assert np.abs(found["a"] - found["c"]).max() > 1e-3


def test_weights_and_chance_score_what_rows_score_and_a_child_is_cut_by_them(
    importance: Importance, parent: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("activations", "weights", "random"):
        folder = tmp_path / name
        assert importance(f"output={folder}", f"scores={name}") == 0
        found[name] = ranking.read(folder)
        assert found[name].header.scores == name
        assert found[name].header.rows == (6 if name == "activations" else 0)
    layers_by = {"activations": "cosine", "weights": "weights", "random": "random"}
    shapes = {
        name: {key: one.shape for key, one in made.scores.items() if not key.startswith("layers.")}
        for name, made in found.items()
    }
    assert shapes["activations"] == shapes["weights"] == shapes["random"]
    for name, metric in layers_by.items():
        assert found[name].layers(metric).shape == (4,)
    asked = (f"ranking={tmp_path / 'weights'}", f"output={tmp_path / 'child'}", "depth.layers=3")
    assert cli.main(["prune", f"checkpoint={parent}", *asked, "model.hidden_size=32"]) == 0
    kept = np.sort(np.argsort(-found["weights"].layers("weights"), kind="stable")[:3])
    letters = np.array(list("ME*-"))
    assert frozen.load(tmp_path / "child").model.pattern.startswith("".join(letters[kept]))


def test_what_runs_no_model_takes_no_layers_out(
    importance: Importance, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importance("scores=weights", "layers=[loss]") == 2
    assert "loss: takes layers out, and scores=weights runs no model" in capsys.readouterr().err


def test_layers_are_scored_on_a_task(importance: Importance, tmp_path: Path) -> None:
    asked = ("layers=[accuracy]", "tasks=[heldout]", "task.heldout.tokens=600", "limit=3")
    assert importance(*asked) == 0
    scores = ranking.read(tmp_path / "ranking").layers("accuracy")
    assert (np.abs(scores) <= 1).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rows=100000000",), r"rows = 100000000: source .* take rows=\d+, a shorter"),
        (("layers=[accuracy]",), r"tasks.*must name one task"),
        (("blocks=[2]",), r"blocks.*needs one of `layers` that takes layers out"),
        (("layers=[loss]", "layer_rows=7"), r"layer_rows = 7: must be at most rows.*6"),
        (("layers=[cosine,cosine]",), r"layers = cosine: is there twice"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_what_can(
    words: tuple[str, ...], said: str, importance: Importance, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert importance(*words) == 2
    assert not (tmp_path / "ranking").exists()
    import re

    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_a_folder_that_holds_something_is_left_alone(
    importance: Importance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranking").mkdir()
    (tmp_path / "ranking" / "mine").touch()
    assert importance() == 2
    assert "is not empty; a ranking gets a folder of its own" in capsys.readouterr().err
    assert [one.name for one in (tmp_path / "ranking").iterdir()] == ["mine"]


@pytest.mark.slow
def test_two_processes_write_the_ranking_of_one(
    importance: Importance, parent: Path, tmp_path: Path
) -> None:
    asked = ("layers=[cosine,logits_mse]", "layer_rows=3")
    assert importance(*asked) == 0
    one = ranking.read(tmp_path / "ranking")
    for split in ("tensor", "pipeline", "expert", "context"):
        words = (f"output={tmp_path / split}", f"parallel.{split}=2", *FEW, *asked)
        done = finish(start("importance", f"checkpoint={parent}", *words, processes=2))
        assert done.code == 0, done.said
        two = ranking.read(tmp_path / split)
        assert two.header == one.header
        for name, scores in one.scores.items():
            largest = np.abs(scores).max()
            np.testing.assert_allclose(two.scores[name], scores, rtol=0, atol=2e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_one_rank_that_fails_ends_all_of_them(split: str, corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "failing"
    edit = "edits=[{kind: 'tests.masking:FailOnOneRank'}]"
    done = train(run_dir, f"data.folder={corpus}", "train.tokens=256", edit)
    assert done.code == 0, done.said
    words = (f"output={tmp_path / 'ranking'}", f"parallel.{split}=2", *FEW)
    begin = time.monotonic()
    done = finish(start("importance", f"checkpoint={run_dir}", *words, processes=2))
    assert done.code != 0
    assert "a layer that fails" in done.said, done.said
    assert time.monotonic() - begin < SECONDS
    assert not (tmp_path / "ranking").exists()
