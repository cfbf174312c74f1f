"""Print constraints.txt as it holds on an image with a torch of its own.

    python docker/base_constraints.py constraints.txt

The base's torch stays, and with it what it was built with: these are pinned to what is installed,
or left out where the base has no such package. Everything else is pinned as in the list.
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# torch, its compiler, and the libraries of CUDA, which an image of NVIDIA's has outside of pip.
OF_THE_BASE = re.compile(r"(torch|triton|nvidia[-_].*|cuda[-_].*)==", re.IGNORECASE)


def constraints(lines: list[str]) -> Iterator[str]:
    """Yield the lines with the base's own packages at the versions that are installed."""
    for line in lines:
        if not OF_THE_BASE.match(line):
            yield line
            continue
        name = line.partition("==")[0]
        try:
            yield f"{name}=={metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


if __name__ == "__main__":
    print("\n".join(constraints(Path(sys.argv[1]).read_text().splitlines())))
