"""A disk that is full for some files."""

import builtins
import io
from typing import Any

import pytest


def full_disk(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Let what is written to files whose names end in `suffix` find the disk full."""
    real = open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode or not str(path).endswith(suffix):
            return real(path, mode, *args, **kwargs)
        return real("/dev/full", mode, buffering=0 if "b" in mode else -1)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)  # which Path.open calls
