"""Fixtures of several packages; torch is imported by those who ask for them."""

import ctypes
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


@pytest.fixture
def no_privilege() -> Iterator[None]:
    """Take from root, for a while, what lets it read and write in spite of permissions.

    capset of <linux/capability.h>: version 3, this thread, two words of 32 bits for each set.
    """
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE is 1, CAP_DAC_READ_SEARCH 2
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0
