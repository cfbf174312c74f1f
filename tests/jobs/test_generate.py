"""The job generate from its command line to the text that it writes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_train.jobs import cli
from tests.jobs.command import train
from tests.tiny import MEGATRON_WARNINGS

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("generate")]

Generate = Callable[..., int]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder of the smallest model after two steps."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    done = train(folder, f"data.folder={corpus}", "train.tokens=512")
    assert done.code == 0, done.said
    return folder


@pytest.fixture
def generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Calls the job with overrides on the trained model."""
    capsys.readouterr()  # what training said

    def call(*overrides: str) -> int:
        return cli.main(
            ["generate", f"checkpoint={checkpoint}", "runtime=cpu", "runtime.threads=1", *overrides]
        )

    return call


def test_the_same_call_writes_the_same_text(
    generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prompt=import os", "max_new_tokens=6", "temperature=1", "top_k=9", "top_p=0.9")
    assert generate(*words) == 0
    first = capsys.readouterr()
    assert first.out.startswith("import os")
    assert len(first.out) > len("import os\n")
    assert "tokens/s" in first.err
    generate(*words)
    assert capsys.readouterr().out == first.out


def test_prompts_of_the_command_line_and_of_a_file_are_continued_together(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("class A:\n\n    def b(self)\n")
    given = ("prompt=x = [1, 2]", f"prompt_file={lines}", "max_new_tokens=3")
    assert generate(*given) == 0
    shown = capsys.readouterr().out
    for number, prompt in enumerate(("x = [1, 2]", "class A:", "    def b(self)"), start=1):
        assert f"--- prompt {number} of 3 ---\n{prompt}" in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "prompt_file=PATH"),
        (["prompt_file=nowhere.txt"], "there is no such file"),
        (["prompt=a", "top_p=2"], "top_p = 2.0: must be at most 1"),
        (["prompt=a", "temprature=1"], "temperature"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    generate: Generate, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert generate(*overrides) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_a_file_without_prompts_is_refused(
    generate: Generate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    assert generate(f"prompt_file={empty}") == 2
    assert "needs one prompt per line; it is empty" in capsys.readouterr().err
