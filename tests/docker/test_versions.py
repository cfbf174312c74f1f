"""versions.env, constraints.txt, setup.py and the Dockerfiles agree."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hybrid_train.config.supported import plain_name, read_pins
from tests.docker.programs import DOCKER, ROOT, arguments, setup_words, versions

PINS = read_pins((ROOT / "constraints.txt").read_text())
REQUIRED = [*setup_words()["install_requires"]]
REQUIRED += [
    line for extra in ("gpu", "hf", "dev") for line in setup_words()["extras_require"][extra]
]


@pytest.mark.parametrize(
    ("name", "distributions"),
    [
        ("TORCH", ["torch"]),
        (
            "TRANSFORMER_ENGINE",
            ["transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"],
        ),
        ("MAMBA_SSM", ["mamba-ssm"]),
        ("CAUSAL_CONV1D", ["causal-conv1d"]),
    ],
)
def test_a_version_of_the_images_is_the_pinned_one(name: str, distributions: list[str]) -> None:
    assert {PINS[distribution] for distribution in distributions} == {versions()[name]}


@pytest.mark.parametrize("line", REQUIRED)
def test_what_setup_asks_for_is_pinned_within_its_limits(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(PINS[plain_name(requirement.name)])


def test_the_python_of_the_images_is_that_of_the_package() -> None:
    python = versions()["PYTHON"]
    assert SpecifierSet(setup_words()["python_requires"]).contains(f"{python}.1")
    assert versions()["CPU_BASE"].startswith(f"python:{python}-")


def test_every_version_is_asked_for_and_every_argument_has_one() -> None:
    asked = arguments("Dockerfile") | arguments("Dockerfile.cpu")
    assert asked == set(versions())


def test_no_dockerfile_names_a_version_itself() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        text = (DOCKER / name).read_text()
        assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) in (
            ["${GPU_BASE}"] * 2,
            ["${CPU_BASE}"],
        )
        assert not re.findall(r"==\s*\d", text)
