"""Say which GPU libraries the image holds; fail if one is missing or is not the pinned version.

Versions only: the libraries load the CUDA driver, and a machine that builds images may have none.
"""

import sys
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def pinned_versions(text: str) -> dict[str, str]:
    """Read the lines `name==version` of a constraints file."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and line[0] != "#")
    return {name.strip().lower(): version.strip() for name, version in pairs}


def main() -> int:
    """Print one line per library and return the number of those that are wrong."""
    pins = pinned_versions(CONSTRAINTS.read_text())
    wrong = 0
    for name in LIBRARIES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "missing"
        right = version.split("+")[0] == pins[name]
        wrong += not right
        print(f"{name:20} {version:16} {'' if right else 'wanted ' + pins[name]}".rstrip())
    return wrong


if __name__ == "__main__":
    sys.exit(main())
