"""The files of docker/ as tests use them: read, run, or loaded for their functions."""

import ast
import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def functions(name: str) -> dict[str, Any]:
    """Load a program of docker/ without running it, and return what it defines."""
    return runpy.run_path(str(DOCKER / name), run_name=name)


def versions() -> dict[str, str]:
    """Read versions.env as a shell would."""
    lines = (DOCKER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and line[0] != "#")


def arguments(dockerfile: str) -> set[str]:
    """Return the build arguments that a Dockerfile has no value for."""
    text = (DOCKER / dockerfile).read_text()
    return set(re.findall(r"^ARG (\w+)$", text, re.MULTILINE))


def setup_words() -> dict[str, Any]:
    """Return the arguments of setup.py's call of setup that are written out."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    wanted = {"python_requires", "install_requires", "extras_require"}
    return {
        str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg in wanted
    }
