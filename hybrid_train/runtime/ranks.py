"""Which process this is among those that torchrun or SLURM started."""

import os
from collections.abc import Callable

import torch.distributed as dist

from hybrid_train.config.problems import UserError


def rank() -> int:
    """Return the number of this process; 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of processes of the run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process speaks to the user and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    dist.barrier()


def main_first(work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait; all fail if it fails there.

    Raises:
        UserError: on the other processes, with the words of the main process's error.
    """
    failure: list[str | None] = [None]
    try:
        if is_main():
            work()
    except Exception as error:
        failure[0] = str(error)
        raise
    finally:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        same_everywhere = UserError(failure[0])
        same_everywhere.everywhere = True
        raise same_everywhere
