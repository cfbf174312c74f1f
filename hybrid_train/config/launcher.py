"""Which process this is, of how many: what torchrun or another launcher says by variables.

torchrun sets every variable of `NAMES`, and TORCHELASTIC_RUN_ID; SLURM itself sets none of them.
What a shell, a batch script or a container has left over is one process, or is refused by name.
"""

import os

from hybrid_train.schema.problems import UserError

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
LOCAL_RANK, LOCAL_WORLD_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
NAMES = (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
_LARGEST_PORT = 2**16 - 1


def rank() -> int:
    """Return the number of this process; 0 if it runs alone."""
    return _number(RANK, 0)


def world_size() -> int:
    """Return the number of processes of the run."""
    return _number(WORLD_SIZE, 1)


def local_rank() -> int:
    """Return the number of this process on its node."""
    return _number(LOCAL_RANK, 0)


def local_world_size() -> int:
    """Return the number of processes of the run on this node."""
    return _number(LOCAL_WORLD_SIZE, 1)


def meeting_point() -> tuple[str, str]:
    """Return host and port at which rank 0 waits for the others."""
    return _text(MASTER_ADDR), _text(MASTER_PORT)


def by_torchrun() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def require_sound() -> None:
    """Refuse an environment in which this can be neither one process nor one of several.

    Raises:
        UserError: naming the variable, and what to do.
    """
    number, processes = rank(), world_size()
    if processes < 1:
        raise _unsound(f"{WORLD_SIZE} = {processes} must be at least 1")
    within = LOCAL_WORLD_SIZE if _text(LOCAL_WORLD_SIZE) else WORLD_SIZE
    for name, value, limit in ((RANK, number, WORLD_SIZE), (LOCAL_RANK, local_rank(), within)):
        if not 0 <= value < max(1, _number(limit, 1)):
            so_many = f"is {_text(limit)}" if _text(limit) else "is not set"
            raise _unsound(
                f"{name} = {value} makes this one of several processes, but {limit} {so_many}"
            )
    if not 1 <= local_world_size() <= processes:
        of_all = f"must lie between 1 and {WORLD_SIZE} ({processes})"
        raise _unsound(f"{LOCAL_WORLD_SIZE} = {local_world_size()} {of_all}")
    if processes > 1:
        _require_meeting_point(processes)


def _require_meeting_point(processes: int) -> None:
    missing = [name for name in (RANK, MASTER_ADDR, MASTER_PORT) if not _text(name)]
    if missing:
        told = f"{WORLD_SIZE} = {processes} says that this is one of {processes} processes"
        verb = "is" if len(missing) == 1 else "are"
        raise _unsound(f"{told}, but {', '.join(missing)} {verb} not set")
    port = _number(MASTER_PORT, 0)
    if not 0 < port <= _LARGEST_PORT:
        raise _unsound(f"{MASTER_PORT} = {port} must lie between 1 and {_LARGEST_PORT}")


def unused() -> list[str]:
    """Return the variables that are set and say nothing, where one process runs by itself."""
    if by_torchrun() or world_size() > 1:
        return []
    return [name for name in NAMES if name in os.environ]


def require_alone(job: str) -> None:
    """Refuse several processes for a job of one.

    Raises:
        UserError: on all of them.
    """
    if world_size() > 1:
        error = UserError(
            f"{job} runs in one process, and this is one of {world_size()} ({WORLD_SIZE}); start "
            f"it without torchrun, and unset {WORLD_SIZE} if no launcher has set it"
        )
        error.on_all_ranks = True
        raise error


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, unset: int) -> int:
    """Return the value of a variable; one that is empty is not set."""
    text = _text(name)
    try:
        return int(text) if text else unset
    except ValueError:
        raise _unsound(f"{name} = {text} is no whole number") from None


def _unsound(what: str) -> UserError:
    there = " ".join(name for name in NAMES if name in os.environ)
    return UserError(
        f"{what}, in the environment of this command. torchrun sets such variables by itself: "
        f"start with torchrun for several processes, or unset {there} for one"
    )
