"""Commands that no user should have typed: each gets a sentence, in time, and writes nothing.

python -m tests.jobs.test_bad_commands    prints what each line of bad_commands.txt is told
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.warm import interpreter

COMMANDS = Path(__file__).with_name("bad_commands.txt").read_text(encoding="utf-8").splitlines()
BEFORE = ("Starting: ", "Its run folder is ")  # what a command says before it loads torch
HANG_S = 60  # of a machine that is busy; on a quiet one each takes a second


@dataclass(frozen=True)
class Refusal:
    """What became of a command."""

    code: int
    said: str
    wrote: list[str]
    seconds: float


def refusal(line: str) -> Refusal:
    """Run a command in a folder with a letter, some notes and an empty folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "letter.txt").write_text("Dear reader")
        (folder / "notes").mkdir()
        (folder / "notes" / "a.md").write_text("milk")
        (folder / "empty").mkdir()
        before = set(folder.rglob("*"))
        start = time.monotonic()
        done = subprocess.run(
            [interpreter.warm(), "-m", "hybrid_train", *words(line)],
            capture_output=True, text=True, timeout=HANG_S, cwd=folder,
            env=interpreter.environment(),
        )  # fmt: skip
        wrote = [str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before]
        return Refusal(done.returncode, done.stdout + done.stderr, wrote, time.monotonic() - start)


def words(line: str) -> Iterator[str]:
    """Split a line at blanks outside of brackets; `""` is a word without letters."""
    word = ""
    for part in line.split(" "):
        word = f"{word} {part}" if word else part
        if all(word.count(one) == word.count(other) for one, other in ("[]", "{}")):
            yield word if word != '""' else ""
            word = ""
    if word:
        yield word


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:60])
def test_a_bad_command_gets_a_sentence_and_writes_nothing(line: str) -> None:
    found = refusal(line)
    assert (found.code, found.wrote) == (2, []), found.said
    assert "Traceback" not in found.said
    said = [one for one in found.said.splitlines() if not one.startswith(BEFORE)]
    assert said[0].startswith("hybrid-train: ")


def main() -> None:
    """Print all refusals, and how long the longest took."""
    refusal("--version")  # the server has imported everything by then
    found = {line: refusal(line) for line in COMMANDS}
    for line, one in found.items():
        sys.stdout.write(f"$ hybrid-train {line}\n{one.said}[exit {one.code}, {one.wrote}]\n\n")
    longest = max(found, key=lambda line: found[line].seconds)
    others = sum(one.code != 2 for one in found.values())
    sys.stdout.write(
        f"{len(found)} commands, {others} that did not end with exit code 2; "
        f"the longest took {found[longest].seconds:.1f} s: {longest}\n"
    )


if __name__ == "__main__":
    main()
