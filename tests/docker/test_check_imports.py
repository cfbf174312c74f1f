"""The parts of docker/check_imports.py, and the constraints of an image with its own torch."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hybrid_train.config.supported import plain_name
from tests.docker.programs import functions, setup_words

CHECK = functions("check_imports.py")
BASE = functions("base_constraints.py")


def test_an_image_promises_what_setup_asks_for() -> None:
    needed = {plain_name(Requirement(line).name) for line in setup_words()["install_requires"]}
    extra = {plain_name(Requirement(line).name) for line in setup_words()["extras_require"]["gpu"]}
    assert set(CHECK["promised"]("cpu")) == needed
    assert set(CHECK["promised"]("gpu")) == needed | extra


def test_a_missing_library_and_another_version_are_wrong() -> None:
    found = metadata.version("einops")
    wrong_version = CHECK["wrong_version"]
    assert wrong_version("einops", found, rebuilt=False) == ""
    assert wrong_version("einops", None, rebuilt=False) == ""
    assert wrong_version("einops", "0.1", rebuilt=False) == f"{found}, wanted 0.1"
    assert wrong_version("no-such-library", "0.1", rebuilt=False) == "missing"


def test_a_library_that_cannot_be_imported_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CHECK["wrong_import"]("einops") == ""
    (tmp_path / "einops.py").write_text("raise OSError('libcudart.so.13')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert CHECK["wrong_import"]("einops") == "cannot be imported: OSError: libcudart.so.13"


def test_a_job_that_fails_is_told_with_what_it_said() -> None:
    (wrong,) = CHECK["wrong_job"]("train", "experiment=no_such")
    assert wrong.startswith("hybrid-train train: ")
    assert "no_such" in wrong
    assert list(CHECK["wrong_job"]("--version")) == []


def test_the_packages_of_the_base_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"torch": "2.11.0a0+a6c236b9fd.nv26.03", "triton": "3.6.0+nv"}

    def version(name: str) -> str:
        if name not in base:
            raise metadata.PackageNotFoundError(name)
        return base[name]

    monkeypatch.setattr(metadata, "version", version)
    lines = ["# list", "torch==2.11.0", "torchao==0.18.0", "triton==3.6.0", "cuda-toolkit==13.0.2"]
    lines += ["nvidia-cublas==13.1.0.3", "numpy==2.5.5"]
    assert list(BASE["constraints"](lines)) == [
        "# list",
        "torch==2.11.0a0+a6c236b9fd.nv26.03",
        "torchao==0.18.0",
        "triton==3.6.0+nv",
        "numpy==2.5.5",
    ]
