"""Bytes at given positions of files, whole even where the system takes or gives a part only."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.checkpoint import tensor_files
from hybrid_train.checkpoint.tensor_files import FilePosition, OpenFiles

VALUES = torch.arange(50, dtype=torch.int16)


def at_most(number: int, call: Callable[..., int]) -> Callable[..., int]:
    """Let a call of the system do a few bytes only, as it may."""

    def cut(descriptor: int, what: Any, position: int) -> int:
        if isinstance(what, list):
            return call(descriptor, [what[0][:number]], position)
        return call(descriptor, what[:number], position)

    return cut


def test_values_are_written_and_read_at_their_position_however_little_the_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", at_most(7, os.pwrite))
    monkeypatch.setattr(os, "preadv", at_most(7, os.preadv))
    path = tmp_path / "file"
    with path.open("wb") as file:
        FilePosition(file.fileno(), 3, b"before", b"behind").write(VALUES)
    assert path.read_bytes() == b"\0\0\0before" + VALUES.numpy().tobytes() + b"behind"
    files, found = OpenFiles(), torch.empty_like(VALUES)
    assert files.fill(path, 9, found)
    assert torch.equal(found, VALUES)
    assert not files.fill(path, 16, found)  # a byte less than are needed
    files.close()


def test_a_tensor_larger_than_one_write_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_WRITTEN_AT_ONCE", 32)
    path = tmp_path / "file"
    with path.open("wb") as file:
        FilePosition(file.fileno(), 0).write(VALUES.view(5, 10).t())
    assert path.read_bytes() == VALUES.view(5, 10).t().contiguous().numpy().tobytes()
