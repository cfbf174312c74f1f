"""A program: a twin takes a step while one rank of it calls otherwise than the others.

    python -m tests.planted_calls FAULT

It prints what is found as JSON. It is a process of its own, since the ranks are forked from it:
one that has computed gradients cannot be forked to compute more.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from hybrid_train.planning.agreement import faults
from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from tests.tiny import tiny_job

WRONG_RANK, WRONG_CALL = 1, 6  # the sixth all-reduce of rank 1


def leaves_one_out(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda number, *given, **named: None if number == WRONG_CALL else call(*given, **named)


def gives_another_size(call: Callable[..., Any]) -> Callable[..., Any]:
    def make(number: int, tensor: Any, *given: Any, **named: Any) -> Any:
        if number == WRONG_CALL:
            tensor = tensor.new_zeros(tensor.numel() + 1)
        return call(tensor, *given, **named)

    return make


def swaps_two(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call behind the next one."""
    late: list[tuple[Any, Any]] = []

    def make(number: int, *given: Any, **named: Any) -> Any:
        if number == WRONG_CALL:
            late.append((given, named))
            return None
        work = call(*given, **named)
        while late:
            given, named = late.pop()
            call(*given, **named)
        return work

    return make


def none(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *given, **named: call(*given, **named)


FAULTS = {one.__name__: one for one in (leaves_one_out, gives_another_size, swaps_two, none)}


def planted(name: str) -> Callable[[], Any]:
    """Return what a rank is in while it runs: one of them makes its all-reduces otherwise."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        if dist.get_rank() == WRONG_RANK:
            make, numbers = FAULTS[name](dist.all_reduce), iter(range(1, 10**6))
            dist.all_reduce = lambda *given, **named: make(next(numbers), *given, **named)
        yield

    return around


def main(name: str) -> None:
    """Take the step and print what was found."""
    cpu.install()
    from hybrid_train.jobs.twin_ranks import record

    job = tiny_job("MEM*M-", parallel=Parallel(tensor=2, pipeline=2))
    found = record(job, 4, planted(name))
    told = {
        "faults": list(faults(found.calls, found.failures)),
        "failures": {str(rank): words for rank, words in found.failures.items()},
        "calls": {str(rank): len(calls) for rank, calls in found.calls.items()},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
