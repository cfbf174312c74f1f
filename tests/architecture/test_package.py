"""conf/, the pinned versions and every module reach whoever installs a wheel, or an sdist."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("package")  # the source tree is built once, in one worker

BUILD = "import setuptools.build_meta as b; b.build_{kind}({folder!r})"


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist with the setuptools of this environment, and return its file."""
    code = BUILD.format(kind=kind, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (path for path in folder.iterdir() if path.suffix in {".whl", ".gz"})
    return built


def files_below(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source_copy, tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_every_module(wheel: Path, source_copy: Path) -> None:
    modules = files_below(source_copy / "hybrid_train", "*.py")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"hybrid_train/{module}" for module in modules} <= names
    assert {"hybrid_train/jobs/report.html", "hybrid_train/jobs/report.js"} <= names


def test_an_installed_wheel_has_conf_and_the_pinned_versions_below_its_prefix(
    wheel: Path, source_copy: Path, tmp_path: Path
) -> None:
    # --ignore-installed: the environment may hold this very version as an editable install.
    options = ["--no-index", "--no-deps", "--ignore-installed", "--quiet", f"--prefix={tmp_path}"]
    command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
    subprocess.run(command, cwd=tmp_path, check=True)
    installed = files_below(tmp_path / "share" / "hybrid_train" / "conf", "*.yaml")
    assert installed == files_below(source_copy / "conf", "*.yaml")
    # pip compiles the one that is Python.
    scripts = files_below(tmp_path / "share" / "hybrid_train" / "launch" / "slurm", "*.*")
    sources = {name for name in scripts if "__pycache__" not in name}
    assert sources == {"train.sbatch", "node.sh", "requeue.py"}
    pins = tmp_path / "share" / "hybrid_train" / "constraints.txt"
    assert pins.read_text() == (source_copy / "constraints.txt").read_text()


def test_a_source_distribution_is_complete(source_copy: Path, tmp_path: Path) -> None:
    expected = files_below(source_copy / "hybrid_train", "*.py")
    expected = {f"hybrid_train/{name}" for name in expected}
    expected |= {f"conf/{name}" for name in files_below(source_copy / "conf", "*.yaml")}
    expected |= {"hybrid_train/jobs/report.html", "hybrid_train/jobs/report.js"}
    expected |= {"Makefile", "LICENSE", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run"}
    with tarfile.open(build("sdist", source_copy, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected <= names
