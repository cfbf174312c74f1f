"""The versions of third-party packages that the project is developed with: constraints.txt."""

import re

from hybrid_train.config.compose import conf_dir


def pinned() -> dict[str, str]:
    """Return the pinned versions by plain name; empty where the list was not installed."""
    file = conf_dir().parent / "constraints.txt"
    return read_pins(file.read_text()) if file.is_file() else {}


def read_pins(text: str) -> dict[str, str]:
    """Read the lines `name==version` of a constraints file."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and line[0] != "#")
    return {plain_name(name): version.strip() for name, version in pairs}


def plain_name(distribution: str) -> str:
    """Write the name of a distribution the one way that names are compared in (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def is_pinned(found: str, pin: str, *, rebuilt: bool = False) -> bool:
    """Tell whether a version is the pinned one; parts of a build (2.11.0+cpu) do not count.

    Args:
        found: as it was installed.
        pin: of constraints.txt.
        rebuilt: whether another's build of the same release will do, which is marked as one ahead
            of it: 2.11.0a0+a6c236b9fd.nv26.03 of NVIDIA's images for 2.11.0.
    """
    release = found.partition("+")[0]
    return pin in (release, re.sub(r"a0$", "", release) if rebuilt else release)
