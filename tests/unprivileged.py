"""A process, or a thread, that permissions bind even where the tests run as root.

python tests/unprivileged.py WORDS    as `hybrid-train WORDS`
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of linux/capability.h
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2  # what lets root into every folder and file


def give_up_privilege() -> None:
    """Let the permissions of files bind this thread for the rest of its life."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those above 31
    assert libc.capget(header, sets) == 0
    for number in range(3):
        sets[number] &= ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert libc.capset(header, sets) == 0


def call[T](function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own that has no privilege."""
    outcome: list[Any] = []

    def work() -> None:
        give_up_privilege()
        try:
            outcome.append((function(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


if __name__ == "__main__":
    from hybrid_train.jobs.cli import main

    give_up_privilege()
    sys.exit(main())
