"""Every command that README.md shows is run, in the order of the page, in a copy of the tree.

Three things differ from a reader's shell: `make TARGET` is only resolved (`make -n`: its recipe
would install and train again), a training command gets the overrides of `SHORT` at its end, and
the commands of `NOT_RUN` are skipped with the reason given there. A program that this file does
not know fails its test, so that no command is left out unnoticed.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hybrid_train.config.compose import compose
from hybrid_train.config.problems import ConfigError, collect
from hybrid_train.config.schema.precision import Precision

# One worker: a command may use what an earlier one has made.
pytestmark = pytest.mark.xdist_group("readme")

README = Path(__file__).parents[2] / "README.md"
BASH_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHORT = "train.tokens=4k train.validation_batches=1"  # 16 steps; a profile is of 5 and 6
INFORMATION = {"--help", "-h", "--cfg", "--info"}  # asks a job about itself; nothing is trained
SHELL_OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}
PROGRAMS = {
    *("hybrid-train", "torchrun", "make", "python", "launch/local.sh", "launch/submit.py"),
    *("ls", "cat", "tail"),
}
NOT_RUN = {
    "git": "would clone over the network",
    "cd": "the test already stands in the tree",
    "source": "the test already runs in the environment",
    "pip": "would change the environment that runs the tests",
    "tensorboard": "serves until it is stopped",
    "wandb": "needs an account",
    "docker": "needs a Docker daemon and the network",
    "sbatch": "needs a SLURM cluster",
}
TIMEOUT_S = 300


def commands(text: str) -> list[str]:
    """List the commands of all bash blocks; continued lines joined, comments dropped."""
    found = []
    for block in BASH_BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(line.strip())
    return found


def words_of(command: str) -> list[str]:
    """Split a command, without variables set before it; .venv/bin/x counts as x."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        del words[0]
    return [words[0].removeprefix(".venv/bin/").removeprefix("./"), *words[1:]] if words else []


def is_training(words: list[str]) -> bool:
    """Tell whether the command would train."""
    job = "train" in words[1:] or words[0] == "launch/local.sh"
    return words[0] != "make" and job and not INFORMATION & set(words)


def as_run(command: str) -> str:
    """Write the command as the test runs it."""
    words = words_of(command)
    line = re.sub(r"\s+#.*$", "", command).replace(".venv/bin/", "")
    if words[0] == "make":
        return f"make -n PYTHON={shlex.quote(sys.executable)} {shlex.join(words[1:])}"
    if is_training(words):
        assert SHELL_OPERATORS.isdisjoint(words), "show a training command on a line of its own"
        return f"{line} {SHORT}"
    return line


SHOWN = commands(README.read_text()) if README.exists() else []


def test_readme_shows_commands() -> None:
    assert README.exists(), "README.md is missing"
    assert SHOWN, "README.md has no bash block"


@pytest.fixture(scope="module")
def environment(source_copy: Path) -> dict[str, str]:
    """Variables under which `hybrid-train` and `python -m hybrid_train` use the copy."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(source_copy), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_command_runs(command: str, source_copy: Path, environment: dict[str, str]) -> None:
    words = words_of(command)
    assert words, f"{command!r} names no program"
    if words[0] in NOT_RUN:
        pytest.skip(f"{words[0]}: {NOT_RUN[words[0]]}")
    assert words[0] in PROGRAMS, f"say in this file how {words[0]} is tested"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", as_run(command)],
        cwd=source_copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{as_run(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(
    ("shown", "run"),
    [
        ("ls conf  # the groups", "ls conf"),
        (".venv/bin/hybrid-train recipes", "hybrid-train recipes"),
        ("hybrid-train train --help", "hybrid-train train --help"),
        ("hybrid-train train experiment=x", "hybrid-train train experiment=x " + SHORT),
        (
            "A=1 torchrun -m hybrid_train train",
            "A=1 torchrun -m hybrid_train train " + SHORT,
        ),
        ("launch/local.sh --cpu 2", "launch/local.sh --cpu 2 " + SHORT),
    ],
)
def test_only_a_training_command_is_shortened(shown: str, run: str) -> None:
    assert as_run(shown) == run


def test_a_block_is_read_with_continued_lines_and_without_comments() -> None:
    text = "```bash\n# first\nmake train\nls a \\\n  b\n```\n```python\nx = 1\n```\n"
    assert commands(text) == ["make train", "ls a    b"]


def test_the_experiment_of_the_readme_lacks_nothing_but_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (one for one in YAML_BLOCK.findall(README.read_text()) if one.startswith("# @pack"))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(block)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as refused:
        compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert {problem.path for problem in refused.value.problems} == {
        "data.tokenizer",
        "data.sources.web.train",
        "data.sources.web.validation",
        "data.sources.code.validation",
    }


def test_the_recipe_of_the_readme_is_one() -> None:
    (block,) = (one for one in YAML_BLOCK.findall(README.read_text()) if one.startswith("format:"))
    section = OmegaConf.merge(OmegaConf.structured(Precision), OmegaConf.create(block))
    assert list(collect(OmegaConf.to_object(section))) == []
