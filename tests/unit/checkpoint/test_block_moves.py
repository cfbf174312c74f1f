"""Blocks moved by several threads: the same files and the same error as with one."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.checkpoint import block_moves
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.schema.problems import UserError
from tests.hf_folders import folder_of, read_files, write_files

SUPER = "Super, latent experts, MTP"
FIRST, LATER = "backbone.layers.0.mixer.in_proj.weight", "backbone.norm_f.weight"


def with_threads(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use so many threads, whatever the machine has, and blocks of a few rows."""
    monkeypatch.setattr(block_moves, "_threads", lambda: number)
    monkeypatch.setattr(block_moves, "BLOCK_BYTES", 1000)


def weights(folder: Path) -> dict[str, bytes]:
    """Return the content of all files that hold tensors, and of their index."""
    kinds = (".distcp", ".metadata", ".safetensors")
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.name.endswith(kinds)}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_files_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(SUPER, tmp_path / "hf")
    made = {}
    for number in (1, 5):
        with_threads(number, monkeypatch)
        run, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        import_folder(source, run, None)
        export_checkpoint(run, out, dtype, 40_000)
        made[number] = weights(run), weights(out)
    assert len(made[1][0]) == 2  # the items, and their index
    assert len(made[1][1]) > 1
    assert made[1] == made[5]


@pytest.mark.parametrize("number", [1, 5])
def test_the_first_of_several_faults_is_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_threads(number, monkeypatch)
    source = folder_of(SUPER, tmp_path / "hf")
    found = read_files(source)
    found[FIRST][150, 3], found[FIRST][160, 0], found[LATER][0] = torch.nan, torch.inf, torch.nan
    write_files(source, found)
    with pytest.raises(UserError, match=f"{FIRST} holds nan in row 150"):
        import_folder(source, tmp_path / "run", None)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_that_fills_up_in_a_thread_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_threads(5, monkeypatch)
    source, write, calls = folder_of(SUPER, tmp_path / "hf"), os.pwrite, itertools.count()

    def until_full(*arguments: Any) -> int:
        if next(calls) > 50:
            raise OSError(errno.ENOSPC, "no space")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", until_full)
    with pytest.raises(UserError, match="the disk is full"):
        import_folder(source, tmp_path / "run", None)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_threads_of_torch_are_as_many_after_a_conversion_as_before(tmp_path: Path) -> None:
    source, before = folder_of("dense H", tmp_path / "hf"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        import_folder(source, tmp_path / "run", None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
