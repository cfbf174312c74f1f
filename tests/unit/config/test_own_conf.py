"""YAML files of the user's own: in conf/ of the working folder, or in a folder that is named."""

import os
import sys
from pathlib import Path

import pytest

from hybrid_train.config import describe, own_conf
from hybrid_train.config.compose import compose
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.jobs import cli, sweep
from hybrid_train.jobs.study_plan import plan_study
from hybrid_train.schema.problems import ConfigError, UserError

MINE = "# @package _global_\n# Seed of my own\ndefaults: [tiny_cpu]\ntrain: {seed: 7}\n"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, outside any launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", own_conf.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return folder


def seed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the line of the seed in the config that the command prints."""
    code = cli.main(["train", *words, "experiment=mine", "--cfg", "job"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return next(line for line in shown.out.splitlines() if "seed" in line).strip()


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("conf", ()),
        ("my conf", ("--config-dir", "my conf")),
        ("a,b", ("-cd", "a,b")),
        ("läuft", ("hydra.searchpath=[läuft]",)),
    ],
)
def test_an_experiment_of_ones_own_is_found(
    folder: str, words: tuple[str, ...], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(project / folder, "experiment/mine", MINE)
    assert seed(capsys, *words) == "seed: 7"
    assert own_conf.ENVIRONMENT not in os.environ  # nothing is left behind for the next command


def test_the_option_is_handed_to_the_runs_of_a_sweep_and_of_a_study(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(project / "mine", "experiment/mine", MINE)
    study = (
        "# @package _global_\ntitle: T\nrun_dir: out\nseeds: [1]\nbaseline: a\n"
        "base: [experiment=mine]\nvariants: {a: {}}\n"
    )
    written(folder, "study/own", study)
    seen: list[str] = []
    monkeypatch.setattr(
        sweep, "run_all", lambda _: seen.append(os.environ["HYBRID_TRAIN_OWN_CONF"])
    )
    assert (
        cli.main(["train", "--config-dir", "mine", "experiment=mine", "train.seed=1,2", "-m"]) == 0
    )
    assert seen == [str(folder)]
    monkeypatch.setenv(own_conf.ENVIRONMENT, str(folder))
    (run,) = plan_study(compose("study", ["name=own"])).runs
    assert run.lines[0] == "experiment=mine"


def test_submit_takes_a_cluster_of_ones_own(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "defaults: [/schema/cluster/base@_here_]\ngpus_per_node: 0\n"
    text += "processes_per_node: 1\nnodes: 2\npartition: mine\n"
    written(project / "conf", "cluster/mine", text)
    assert cli.main(["submit", "--dry-run", "experiment=tiny_cpu", "cluster=mine"]) == 0
    assert "#SBATCH --partition=mine" in capsys.readouterr().out


def test_help_lists_the_choices_of_ones_own(project: Path) -> None:
    written(project / "conf", "experiment/mine", MINE)
    assert describe.choices("train")["experiment"]["mine"] == "Seed of my own"
    assert "quickstart" in describe.choices("train")["experiment"]


@pytest.mark.slow
def test_a_file_that_cannot_be_composed_is_left_out_of_the_table_and_told(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(project / "conf", "experiment/half", "# @package _global_\nmodel: {mlp: 1}\n")
    (folder / "experiment" / "broken.yaml").write_text("- a\n")
    assert cli.main(["experiments"]) == 0
    text = capsys.readouterr().out
    assert "\nquickstart " in text
    assert f"broken is left out: {folder}/experiment/broken.yaml" in text
    assert f"half is left out: {folder}/experiment/half.yaml" in text


def test_a_name_that_the_program_has_is_refused_as_soon_as_it_is_used(project: Path) -> None:
    written(project / "conf", "model/tiny", "hidden_size: 8\n")
    compose("train", ["experiment=quickstart"])  # does not read it
    with pytest.raises(ConfigError, match="give that one another name"):
        compose("train", ["experiment=tiny_cpu"])
    own = project / "conf" / "model" / "tiny.yaml"
    own.write_bytes((conf_dir() / "model" / "tiny.yaml").read_bytes())
    compose("train", ["experiment=tiny_cpu"])  # a copy is no other file


def test_a_root_of_another_program_does_not_stand_in_the_way(project: Path) -> None:
    written(project / "conf", "optimizer/sgd", "lr: 1\n")
    (project / "conf" / "config.yaml").write_text("defaults: [optimizer: sgd]\n")
    assert compose("train", ["experiment=tiny_cpu"]).optimizer.kind == "adamw"


def test_a_folder_that_is_not_there_names_the_one_beside_it(project: Path) -> None:
    written(project / "configs", "experiment/mine", MINE)
    with pytest.raises(ConfigError, match=f"nearest: {project}/configs"):
        own_conf.checked(["config"])


def test_an_installed_package_finds_its_conf_folder_below_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "share" / "hybrid_train" / "conf"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(conf_dir())
    monkeypatch.delenv("HYBRID_TRAIN_CONF", raising=False)
    package = tmp_path / "lib" / "hybrid_train" / "config" / "own_conf.py"
    monkeypatch.setattr("hybrid_train.config.own_conf.__file__", str(package))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert conf_dir() == installed
    installed.unlink()
    with pytest.raises(UserError, match="no folder with the configuration") as error:
        conf_dir()
    assert str(installed) in str(error.value)
    assert str(tmp_path / "lib" / "conf") in str(error.value)
