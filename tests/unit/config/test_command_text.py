"""What is printed can be typed: shells and Hydra give back the value that was meant."""

import shlex
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_train.config import overrides
from hybrid_train.config.commands import (
    command,
    quoted,
    setting,
    typed,
)

HOSTILE = [
    *("out/first", "out/my run (2)", "a=1,b", "läuft/тест/走", "it's", 'say "a"', "a\\", 'a\\"b'),
    *("~", "~/x", "x=~/y", "a*b?", "a[0]", "[a]", "{a,b}", "$HOME", "`id`", "a;b", "a&b|c", "#a"),
    *("!!", "=ls", "-x", "null", "1e3", "a\nb", "a b ", "\t", "", "%1", "^a", "a<b>c", "a:b", "@x"),
]


def of_hydra(line: str) -> str:
    """Return the text that Hydra's grammar takes from an override."""
    read = overrides.parse(line)
    assert not isinstance(read, overrides.Problem)
    assert not read.is_sweep_override()
    return str(read.value())


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "1e3"])
def test_hydra_reads_the_value_that_a_setting_was_written_for(text: str) -> None:
    assert of_hydra(setting("run_dir", text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8))
def test_quotes_hold_any_text(text: str) -> None:
    if not text.replace(".", "").replace("_", "").replace("e", "").isalnum():  # numbers: as text
        assert of_hydra(f"key={quoted(text)}") == text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_gives_back_the_words_of_a_command(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed; tests/install_system_parts.sh does")
    words = [setting("run_dir", text) for text in HOSTILE] + HOSTILE
    script = f"set -e; show() {{ printf '%s\\0' \"$@\"; }}; show {typed(*words)}"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words
    assert done.stderr == ""


def test_a_plain_command_has_no_quotes() -> None:
    line = command("status", setting("run_dir", "runs/quickstart"))
    assert line == "hybrid-train status run_dir=runs/quickstart"
    assert shlex.split(command("train", setting("run_dir", "a b")))[-1] == 'run_dir="a b"'
