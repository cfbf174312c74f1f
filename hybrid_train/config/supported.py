"""Versions of libraries: those the project is developed with, the oldest and the newest tried.

`LIBRARIES` is the one table of them. `doctor` holds what is installed against it, docs/versions.md
quotes it, and tests hold constraints.txt, setup.py and docker/versions.env to it. A new version is
tried by the steps in CONTRIBUTING.md, and stands here when its tests have passed.

What constraints.txt pins beside these libraries is read from it (`pinned`).
"""

import re
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from hybrid_train.config.own_conf import conf_dir

_NO_GPU = "sources read, no kernel has run: no GPU was at hand"


@dataclass(frozen=True)
class Supported:
    """Versions of one library.

    Attributes:
        tested: that constraints.txt installs.
        minimum: the oldest that fits.
        maximum: the newest that was ever tried.
        proof: what the tests have run of it.
        others_refused: whether a run does not start with another version than these.
    """

    tested: str
    minimum: str
    maximum: str
    proof: str
    others_refused: bool = False

    def fault(self, found: str, *, rebuilt: bool = False) -> str:
        """Say what is wrong with an installed version; nothing if it is between the limits.

        Args:
            found: as it was installed.
            rebuilt: whether another's build of a tested release will do (`is_pinned`).
        """
        if is_pinned(found, self.tested, rebuilt=rebuilt):
            return ""
        try:
            version = Version(found.partition("+")[0])  # what follows names a build
        except InvalidVersion:
            return f"it is no version that can be compared; tested: {self.tested}"
        if version < Version(self.minimum):
            return f"older than {self.minimum}, the oldest that fits; tested: {self.tested}"
        if version > Version(self.maximum):
            return f"newer than {self.maximum}, the newest that was tried; tested: {self.tested}"
        return ""


LIBRARIES = {
    "torch": Supported("2.11.0", "2.11.0", "2.11.0", "all tests on CPUs"),
    "megatron-core": Supported(
        "0.19.2", "0.19.2", "0.19.2", "all tests on CPUs", others_refused=True
    ),
    "transformer-engine": Supported(
        "2.20.2", "2.20.2", "2.20.2", f"its quantizers in Python; else {_NO_GPU}"
    ),
    "mamba-ssm": Supported("2.3.2.post1", "2.3.2.post1", "2.3.2.post1", _NO_GPU),
    "causal-conv1d": Supported("1.7.0", "1.7.0", "1.7.0", _NO_GPU),
    # 5.8.0 has trained the model of docs/measured.md; older ones were never tried.
    "transformers": Supported(
        "5.23.0", "5.8.0", "5.23.0", "exports loaded, logits compared, on CPUs"
    ),
}


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
