"""What the processes of a run do together: one goes first, one says it, all fail if one does.

torch is imported where processes talk to each other: jobs that prepare data do without it.
"""

from collections.abc import Callable

from hybrid_train.config.launcher import local_rank as local_rank
from hybrid_train.config.launcher import local_world_size as local_world_size
from hybrid_train.config.launcher import rank as rank
from hybrid_train.config.launcher import world_size as world_size
from hybrid_train.schema.problems import UserError, kind_of


def is_main() -> bool:
    """Tell whether this process speaks to the user and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    import torch.distributed as dist

    dist.barrier()


def run_on_main_first(work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait; all fail if it fails there.

    Raises:
        UserError: on the other processes, with the words of the main process's error.
    """
    import torch.distributed as dist

    failure: list[tuple[str, str] | None] = [None]
    try:
        if is_main():
            work()
    except Exception as error:
        failure[0] = str(error), kind_of(error)
        error.on_all_ranks = True  # type: ignore[attr-defined]  # the others raise it too
        raise
    finally:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise _on_all_ranks(*failure[0])


def broadcast_from_main[T](work: Callable[[], T]) -> T:
    """Do `work` on the main process and return its result everywhere; all fail if it fails there.

    Raises:
        UserError: on the other processes, with the words of the main process's error.
    """
    import torch.distributed as dist

    result: list[T | None] = [None]

    def take() -> None:
        result[0] = work()

    run_on_main_first(take)
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]  # it was set on the main process


def is_true_on_all(fact: Callable[[], bool]) -> bool:
    """Tell whether something is so on every process."""
    import torch.distributed as dist

    found: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fact())
    return all(found)


def all_or_none[T](work: Callable[[], T]) -> T:
    """Do `work` on every process; all fail if one does, so that none waits for it later.

    Processes may talk to each other in `work` only before its first step that can fail.

    Raises:
        UserError: where the work itself did not fail, with rank and words of the first that did.
    """
    import torch.distributed as dist

    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failure is None else str(failure) or repr(failure))
    if failure is not None:
        failure.on_all_ranks = True  # type: ignore[attr-defined]
        raise failure
    for number, words in enumerate(said):
        if words is not None:
            raise _on_all_ranks(f"rank {number}: {words}")
    return result


def _on_all_ranks(words: str, kind: str = UserError.kind) -> UserError:
    error = UserError(words)
    error.on_all_ranks, error.kind = True, kind
    return error
