"""docker/build.sh, with a `docker` that only says how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.docker.programs import DOCKER, arguments, versions


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    engine = tmp_path / "docker"
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def build(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DOCKER / "build.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("kind", "file"), [("gpu", "Dockerfile"), ("cpu", "Dockerfile.cpu")])
def test_a_build_gets_each_version_that_its_file_asks_for(
    environment: dict[str, str], kind: str, file: str
) -> None:
    done = build(environment, kind)
    assert done.returncode == 0, done.stderr
    first, *given = done.stdout.splitlines()
    assert first == "build"
    assert given[:4] == ["--file", f"docker/{file}", "--tag", f"hybrid_train:{kind}"]
    assert given[-1] == "."
    asked = {f"--build-arg={name}={versions()[name]}" for name in arguments(file)}
    assert set(given[4:-1]) == asked
    assert len(given[4:-1]) == len(asked)


def test_a_version_can_be_replaced_for_one_build(environment: dict[str, str]) -> None:
    lines = build(environment, "gpu", "CUDA_ARCHS=8.0;9.0", "APEX=abc123").stdout.splitlines()
    assert "--build-arg=CUDA_ARCHS=8.0;9.0" in lines
    assert "--build-arg=APEX=abc123" in lines


@pytest.mark.parametrize("words", [(), ("tpu",), ("gpu", "APEKS=1")])
def test_what_cannot_be_built_is_refused(
    environment: dict[str, str], words: tuple[str, ...]
) -> None:
    done = build(environment, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
