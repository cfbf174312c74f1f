"""The commands prune and lineage: from a trained run to a healed child, its export and import."""

import json
from pathlib import Path

import pytest

from tests.jobs.command import contents, finish, metrics, start
from tests.random_checkpoints import random_ranking
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("prune")]


def call(*words: str) -> tuple[int, str, str]:
    done = finish(start(*words))
    return done.code, done.out, done.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A parent of two steps, and a ranking of it."""
    from hybrid_train.hf.write import open_checkpoint

    folder = tmp_path_factory.mktemp("runs")
    words = ("experiment=tiny_cpu", "runtime.threads=1", f"data.folder={corpus}")
    done = finish(start("train", *words, "train.tokens=512", f"run_dir={folder / 'parent'}"))
    assert done.code == 0, done.said
    parent = open_checkpoint(folder / "parent")
    random_ranking(parent.model, parent.found.path, folder / "ranking")
    return folder


def pruned(runs: Path, name: str, *words: str) -> tuple[int, str, str]:
    given = (f"checkpoint={runs / 'parent'}", f"ranking={runs / 'ranking'}")
    return call("prune", *given, f"output={runs / name}", *words)


def test_a_child_trains_generates_and_is_exported_and_each_says_where_it_comes_from(
    runs: Path, corpus: Path
) -> None:
    code, out, err = pruned(runs, "small", "share=0.7")
    assert code == 0, err
    assert "hidden_size" in out
    words = [f"checkpoint.load={runs / 'small'}", "checkpoint.load_only=weights"]
    words += ["experiment=tiny_cpu", "runtime.threads=1", f"data.folder={corpus}"]
    words += ["objective=distill", f"objective.teacher={runs / 'parent'}", "train.tokens=512"]
    code, _, err = call("train", *words, f"run_dir={runs / 'healed'}")
    assert code == 0, err
    code, out, err = call(
        "generate", f"checkpoint={runs / 'healed'}", "prompt=one", "max_new_tokens=4",
        "runtime.threads=1",
    )  # fmt: skip
    assert code == 0, err
    for way, name in (("export", "healed"), ("import", "out")):
        target = runs / ("out" if way == "export" else "again")
        code, _, err = call("convert", f"{way}={runs / name}", f"output={target}")
        assert code == 0, err
    code, out, err = call("lineage", f"run_dir={runs / 'again'}")
    assert code == 0, err
    lines = out.splitlines()
    depths = [(len(line) - len(line.lstrip())) // 2 for line in lines]
    assert depths == [0, 1, 2, 3, 4, 3]  # again, out, healed, small, parent; the teacher
    assert [line.split(": ")[1].split(",")[0] for line in lines[1:]] == [
        str(runs / name) for name in ("out", "healed", "small", "parent", "parent")
    ]
    assert "hybrid-train prune checkpoint=" in lines[3]
    assert lines[5].startswith("      teacher: ")
    assert lines[5].endswith("as above")
    small = json.loads((runs / "small" / "prune.json").read_text())
    assert small["bytes"]["in"] == small["bytes"]["out"] + small["bytes"]["cut"]
    assert small["ranking"]["folder"] == str(runs / "ranking")
    assert small["parameters"]["child"] <= 0.7 * small["parameters"]["parent"]


@pytest.mark.slow
def test_a_llama_is_cut_taught_by_its_parent_generates_and_is_a_llama_to_transformers(
    tmp_path: Path, corpus: Path
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    words = ["experiment=tiny_cpu", "runtime.threads=1", f"data.folder={corpus}"]
    llama = [
        "model.pattern=*-*-*-", "model.attention.rope.theta=10000", "model.mlp.gated=true",
        "model.mlp.activation=silu", "train.tokens=4k",
    ]  # fmt: skip
    healing = [
        f"checkpoint.load={child}", "checkpoint.load_only=weights", "objective=distill",
        f"objective.teacher={parent}", "train.tokens=8k",
    ]  # fmt: skip
    ranking, healed, out = tmp_path / "ranking", tmp_path / "healed", tmp_path / "out"
    for line in (
        ["train", *words, *llama, f"run_dir={parent}"],
        ["importance", f"checkpoint={parent}", f"output={ranking}", "rows=8", "layers=[loss]"],
        ["prune", f"checkpoint={parent}", f"ranking={ranking}", f"output={child}",
         "model.hidden_size=48", "model.mlp.intermediate_size=96", "depth.drop=[3-4]"],
        ["train", *words, *healing, f"run_dir={healed}"],
        ["generate", f"checkpoint={healed}", "prompt=import", "max_new_tokens=4", "drafts=0"],
        ["convert", f"export={healed}", f"output={out}"],
        ["verify", f"checkpoint={healed}", f"hf={out}"],
    ):  # fmt: skip
        code, _, err = call(*line)
        assert code == 0, (line, err)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (48, 2)
    taught = [one["loss"] for one in metrics(healed) if "loss" in one]
    assert sum(taught[-3:]) < 0.9 * sum(taught[:3])


@pytest.mark.slow
def test_a_child_trains_under_tensor_parallelism_as_on_one_process(
    runs: Path, corpus: Path
) -> None:
    code, _, err = pruned(runs, "even", "model.hidden_size=32", "model.moe.experts=2")
    assert code == 0, err
    words = [f"checkpoint.load={runs / 'even'}", "checkpoint.load_only=weights"]
    words += ["experiment=tiny_cpu", "runtime.threads=1", f"data.folder={corpus}"]
    losses = []
    for processes in (1, 2):
        run_dir = runs / f"on {processes}"
        layout = f"parallel.tensor={processes}"
        done = finish(
            start("train", *words, layout, "train.tokens=512", f"run_dir={run_dir}",
                  processes=processes)
        )  # fmt: skip
        assert done.code == 0, done.said
        losses.append([line["loss"] for line in metrics(run_dir)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) > 1


def test_a_trial_prints_the_sizes_and_writes_nothing(runs: Path) -> None:
    before = contents(runs)
    code, out, err = pruned(runs, "trial", "share=0.7", "dry_run=true")
    assert code == 0, err
    assert "nothing was written" in out
    assert contents(runs) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.hidden_size=100000"], "model.hidden_size"),
        (["share=0.7", "ranking=nowhere"], "nowhere is no ranking"),
        (["share=0.7", "output={parent}"], "is there already"),
        (["share=0.7", "checkpoint={parent}/nothing"], "no checkpoint"),
    ],
)
def test_what_cannot_be_cut_is_said_and_nothing_is_written(
    words: list[str], said: str, runs: Path
) -> None:
    before = contents(runs)
    given = [word.format(parent=runs / "parent") for word in words]
    settings = {"checkpoint": runs / "parent", "ranking": runs / "ranking", "output": runs / "x"}
    own = {word.partition("=")[0] for word in given}
    given += [f"{key}={value}" for key, value in settings.items() if key not in own]
    code, _, err = call("prune", *given)
    assert code == 2
    assert said in err
    assert contents(runs) == before


def test_a_folder_without_a_lineage_is_said(tmp_path: Path) -> None:
    code, _, err = call("lineage", f"run_dir={tmp_path}")
    assert code == 2
    assert "has no lineage.json" in err
