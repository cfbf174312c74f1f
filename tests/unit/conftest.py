"""Fixtures of several packages; torch is imported by those who ask for them."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    """Megatron's process groups of a run of one; this process is emulated as `runtime/cpu.py` says.

    The emulation stays for the rest of the process, and that is meant: other tests of the same
    worker see a torch that accepts device="cuda" and is otherwise the same.
    """
    from tests.tiny import alone

    with alone() as groups:
        yield groups
