"""The commands of a sweep, and the folders of its runs."""

from pathlib import Path

import pytest

from hybrid_train.jobs import multirun
from hybrid_train.schema.problems import ConfigError

QUICKSTART = "experiment=quickstart"


def test_a_sweep_is_one_command_per_combination() -> None:
    lines = [QUICKSTART, "train.seed=1,2", "run_dir=out", "optimizer.beta2=0.9,0.95"]
    runs = multirun.runs("train", lines)
    seeds_and_betas = [(1, 0.9), (1, 0.95), (2, 0.9), (2, 0.95)]
    folders = [f"out/seed={seed}_beta2={beta}" for seed, beta in seeds_and_betas]
    assert [one.words[4:] for one in runs] == [
        [QUICKSTART, f"train.seed={seed}", f"optimizer.beta2={beta}", f'run_dir="{folder}"']
        for (seed, beta), folder in zip(seeds_and_betas, folders, strict=True)
    ]
    assert [str(one.folder) for one in runs] == folders


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["experiment=quickstart,tiny_cpu"], ["experiment=quickstart", "experiment=tiny_cpu"]),
        (["model.pattern=M-,'M*-'"], ["pattern=M-", "pattern=M--"]),
        (["train.seed=1,1"], ["0", "1"]),  # nothing differs
        (["train.seed=1"], ["0"]),
    ],
)
def test_run_folders_of_a_sweep_are_named_by_what_differs(
    lines: list[str], names: list[str]
) -> None:
    given = lines if "experiment" in lines[0] else [QUICKSTART, *lines]
    assert [one.folder.name for one in multirun.runs("train", given) if one.folder] == names


def test_a_sweep_leaves_prompts_alone(tmp_path: Path) -> None:
    lines = [f"checkpoint={tmp_path}", "prompt=f(a, b):", "top_k=1,2"]
    commands = [one.words for one in multirun.runs("generate", lines)]
    assert [command[-1] for command in commands] == ["prompt=f(a, b):"] * 2
    assert [command[-2] for command in commands] == ["top_k=1", "top_k=2"]


def test_a_sweep_with_a_wrong_combination_starts_nothing() -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        multirun.runs("train", [QUICKSTART, "train.seed=1,two"])
