"""How a process ended, in words."""

import signal


def how_it_ended(code: int, stderr: str) -> str:
    """Say how a process ended: by a signal, or with a code and its last words."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    words = stderr.strip().splitlines()
    return f"exit code {code}" + (f", {words[-1]}" if words else "")
