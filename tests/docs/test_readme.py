"""Every command that README.md and its chapters show is run, in their order, in a copy of the tree.

Three things differ from a reader's shell: `make TARGET` is only resolved (`make -n`: its recipe
would install and train again), a training command gets the overrides of `SHORT` at its end, and
the commands of `NOT_RUN` are skipped with the reason given there. A program that this file does
not know fails its test, so that no command is left out unnoticed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hybrid_train.config.compose import compose
from hybrid_train.schema.precision import Precision
from hybrid_train.schema.problems import ConfigError, collect

# One worker: a command may use what an earlier one has made.
pytestmark = pytest.mark.xdist_group("readme")

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CHAPTERS = (
    "command_line",
    "models",
    "layouts",
    "precision",
    "run_folder",
    "generation",
    "evaluation",
    "distillation",
    "stored_targets",
    "pruning",
    "studies",
    "hugging_face",
    "data",
    "gpu",
)
LONGEST = 180  # lines of the README: what does not fit is a chapter
LINK = re.compile(r"\]\(([^)#]+)")
BASH_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
YAML_BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHORT = "train.tokens=4k train.validation_batches=1"  # 16 steps; a profile is of 5 and 6
INFORMATION = {"--help", "-h", "--cfg", "--info"}  # asks a job about itself; nothing is trained
SHELL_OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}
PROGRAMS = {
    *("hybrid-train", "torchrun", "make", "python", "launch/local.sh", "ls", "cat", "tail"),
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


def commands_of_all_blocks(text: str) -> list[str]:
    """List the commands of all blocks, also of those that are shown and not run."""
    blocks = ANY_BLOCK.findall(text)
    shown = commands("".join(f"```bash\n{body}```\n" for kind, body in blocks if not kind))
    return commands(text) + [one for one in shown if words_of(one)[0] in PROGRAMS]


def read_by(shell: str, command: str, folder: Path) -> list[str]:
    """Return the words that a shell makes of a command, in an empty folder."""
    line = re.sub(
        rf"(^|\s){re.escape(words_of(command)[0])}(\s|$)", r"\1record\2", command, count=1
    )
    script = f"record() {{ printf '%s\\0' \"$@\"; }}\n{line}\n"
    done = subprocess.run(
        [shell, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{shell}: {command}\n{done.stderr}"
    return done.stdout.split("\0")[:-1]


def words_of(command: str) -> list[str]:
    """Split a command, without variables set before it; .venv/bin/x counts as x."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        del words[0]
    return [words[0].removeprefix(".venv/bin/").removeprefix("./"), *words[1:]] if words else []


def is_training(words: list[str]) -> bool:
    """Tell whether the command would train, or run a teacher over the rows of a training."""
    job = {"train", "distill_targets"} & set(words[1:]) or words[0] == "launch/local.sh"
    return words[0] != "make" and bool(job) and not INFORMATION & set(words)


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


PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in CHAPTERS)]
TEXT = "\n".join(page.read_text() for page in PAGES)
SHOWN = list(dict.fromkeys(commands(TEXT)))  # one that is shown again is not run again


OTHERS = [
    ROOT / "docs" / f"{name}.md" for name in ("adding", "python", "versions", "nvidia", "gpu_check")
]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_readme_is_short_and_names_every_chapter() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= LONGEST
    assert set(LINK.findall(text)) >= {f"docs/{name}.md" for name in CHAPTERS}


@pytest.fixture(scope="module")
def environment(source_copy: Path) -> dict[str, str]:
    """Variables under which `hybrid-train` and `python -m hybrid_train` use the copy."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(source_copy), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
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


@pytest.fixture
def zsh() -> str:
    found = shutil.which("zsh")
    if found is None:
        pytest.skip("zsh is not installed; tests/install_system_parts.sh does it")
    return found


def test_bash_and_zsh_read_every_command_alike(zsh: str, tmp_path: Path) -> None:
    listed = commands_of_all_blocks(TEXT)
    assert len(listed) > len(SHOWN)
    for command in listed:
        line = command.replace(".venv/bin/", "")
        assert read_by(zsh, line, tmp_path) == read_by("bash", line, tmp_path)


@pytest.mark.parametrize("word", ["a=[0]", "a=*", "a=b?", "=ls", "a={b,c}"])
def test_a_word_that_shells_take_for_their_own_is_noticed(
    word: str, zsh: str, tmp_path: Path
) -> None:
    line = f"hybrid-train train {word}"
    with pytest.raises(AssertionError):  # zsh refuses it, or both expand it
        assert read_by(zsh, line, tmp_path) == ["train", word]


def test_commands_run_in_zsh(zsh: str, source_copy: Path, environment: dict[str, str]) -> None:
    shown = commands(README.read_text())
    (pattern,) = (one for one in shown if "model.pattern=" in one)
    (submit,) = (one for one in shown if one.startswith("hybrid-train submit"))
    for command in (f"{pattern} --cfg job", submit):
        done = subprocess.run(
            [zsh, "-e", "-c", command], cwd=source_copy, env=environment, capture_output=True,
            text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("shown", "run"),
    [
        ("ls conf  # the groups", "ls conf"),
        (".venv/bin/hybrid-train experiments", "hybrid-train experiments"),
        ("hybrid-train train --help", "hybrid-train train --help"),
        ("hybrid-train train experiment=x", "hybrid-train train experiment=x " + SHORT),
        (
            "A=1 torchrun -m hybrid_train train",
            "A=1 torchrun -m hybrid_train train " + SHORT,
        ),
        ("launch/local.sh --cpu 2", "launch/local.sh --cpu 2 " + SHORT),
        ("hybrid-train distill_targets output=x", "hybrid-train distill_targets output=x " + SHORT),
    ],
)
def test_only_a_training_command_is_shortened(shown: str, run: str) -> None:
    assert as_run(shown) == run


def test_a_block_is_read_with_continued_lines_and_without_comments() -> None:
    text = "```bash\n# first\nmake train\nls a \\\n  b\n```\n```python\nx = 1\n```\n"
    assert commands(text) == ["make train", "ls a    b"]


def test_the_experiment_of_the_pages_lacks_nothing_but_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (one for one in YAML_BLOCK.findall(TEXT) if one.startswith("# @pack"))
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


def test_the_recipe_of_the_pages_is_one() -> None:
    (block,) = (one for one in YAML_BLOCK.findall(TEXT) if one.startswith("format:"))
    section = OmegaConf.merge(OmegaConf.structured(Precision), OmegaConf.create(block))
    assert list(collect(OmegaConf.to_object(section))) == []
