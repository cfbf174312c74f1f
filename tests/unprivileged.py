"""Lets the permissions of files bind where the tests run as root, whom they do not bind.

python tests/unprivileged.py WORDS    as `hybrid-train WORDS`
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2  # what lets root into every folder and file


@contextlib.contextmanager
def modes_count() -> Iterator[None]:
    """Give up, in this thread and those it starts, what makes root see no permissions."""
    if os.geteuid() != 0:
        yield
        return
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those above 31
    assert system.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert system.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert system.capset(header, sets) == 0


if __name__ == "__main__":
    from hybrid_train.jobs.cli import main

    with modes_count():
        sys.exit(main())
