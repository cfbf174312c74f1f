"""The lines of docs/python.md run one after the other, as a notebook would."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_lines_run_in_their_order(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shapes = re.findall(r"torch\.Size\(\[(\d+), (\d+), (\d+)\]\)", done.stdout)
    (length, one, _), (batch, positions, _) = shapes
    assert (length, one) == (positions, batch)
