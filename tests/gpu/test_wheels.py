"""Wheels that are carried: cut, joined to the byte, damage found, what is lacking installed."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.gpu import wheels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of loads of at most 1000 bytes: a file of three pieces, a wheel, a small source."""
    monkeypatch.setattr(wheels, "LOAD_BYTES", 1000)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "large_one-1.0-py3-none-any.whl").write_bytes(bytes(range(256)) * 10)
    (whole / "small-2.0.tar.gz").write_bytes(b"source")
    with zipfile.ZipFile(whole / "tiny_pure-3.0-py3-none-any.whl", "w") as file:
        file.writestr("tiny_pure.py", "VALUE = 7\n")
        file.writestr("tiny_pure-3.0.dist-info/METADATA", "Name: tiny_pure\nVersion: 3.0\n")
        file.writestr("tiny_pure-3.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("tiny_pure-3.0.dist-info/RECORD", "")
    wheels.write(tmp_path / "wheels.json", wheels.cut(tmp_path, whole))
    return tmp_path


def carried(folder: Path) -> dict[str, bytes]:
    """Forget the files themselves, as a machine that only the loads were carried to."""
    files = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    for name in files:
        (folder / "whole" / name).unlink()
    return files


def test_loads_are_small_and_joined_to_the_byte(folder: Path) -> None:
    loads = [sum(f.stat().st_size for f in load.iterdir()) for load in folder.glob("load_*")]
    assert len(loads) > 2
    assert max(loads) <= 1000
    before = carried(folder)
    wheels.join(folder)
    assert {path.name: path.read_bytes() for path in (folder / "whole").iterdir()} == before


def test_a_damaged_and_a_missing_piece_are_named_and_the_rest_is_joined(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carried(folder)
    first, *_, last = sorted(folder.glob("load_*/large_one*"), key=lambda path: path.suffix)
    first.write_bytes(b"x" * first.stat().st_size)
    wheels.join(folder)
    assert f"{first.relative_to(folder)} is damaged" in capsys.readouterr().out
    last.unlink()
    wheels.join(folder)
    assert f"{last.relative_to(folder)} is missing" in capsys.readouterr().out
    joined = {path.name for path in (folder / "whole").iterdir()}
    assert joined == {"small-2.0.tar.gz", "tiny_pure-3.0-py3-none-any.whl"}


def test_what_is_lacking_is_installed_and_a_stand_in_for_the_kernels_of_mamba_1(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "whole" / "large_one-1.0-py3-none-any.whl").unlink()
    for piece in folder.glob("load_*/large_one*"):
        piece.unlink()
    wheels.install(folder, tmp_path / "site")
    assert (tmp_path / "site" / "tiny_pure.py").read_text() == "VALUE = 7\n"
    assert (tmp_path / "site" / wheels.EMPTY_MODULE).read_bytes() == b""


def test_another_version_is_lacking_only_where_it_would_be_another_program() -> None:
    assert wheels.is_lacking("megatron-core", "0.0.1")
    assert not wheels.is_lacking("numpy", "0.0.1")
    assert wheels.is_lacking("no-such-distribution", "1")


def test_nvcc_is_asked_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_ARCHITECTURE", "sm_90")
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    called: list[list[str]] = []
    monkeypatch.setattr(wheels.os, "execv", lambda _, words: called.append(words))
    asked = ["-gencode", "arch=compute_75,code=sm_75", "-gencode", "arch=compute_90,code=sm_90"]
    wheels.nvcc(["-c", *asked, "file.cu"])
    assert called == [["/cuda/bin/nvcc", "-c", *asked[2:], "file.cu"]]


def test_a_download_that_is_another_file_than_before_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = wheels.read(folder)
    monkeypatch.setattr(wheels, "LIST", tmp_path / "list.json")
    wheels.compare_with_list(listed, renew=True)
    wheels.compare_with_list(listed, renew=False)
    listed[0] = {**listed[0], "sha256": "0" * 64}
    with pytest.raises(SystemExit, match=str(listed[0]["file"])):
        wheels.compare_with_list(listed, renew=False)


def test_the_list_has_what_is_carried_at_its_pinned_version() -> None:
    listed = json.loads(wheels.LIST.read_text())
    found = {one["name"]: one["version"] for one in listed}
    assert found == wheels.versions()
    for one in listed:
        assert sum(piece["bytes"] for piece in one["pieces"]) == one["bytes"]
        assert all(piece["bytes"] <= 60e6 for piece in one["pieces"])
