"""Writes down every call that a process makes to others, as torch sees it below all libraries.

Each collective and transfer passes torch's dispatcher as an operator of the namespace `c10d`,
whoever calls it and from whichever thread of Python; calls of a group of one are left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_train.planning.agreement import ALL_TO_ALL, RECEIVE, SEND, Call

# Operator -> our word for it, places of what is given and of what is taken among its arguments.
_OPERATORS: dict[str, tuple[str, int | None, int | None]] = {
    "allreduce_": ("all-reduce", 0, 0),
    "allreduce_coalesced_": ("all-reduce", 0, 0),
    "broadcast_": ("broadcast", 0, 0),
    "reduce_": ("reduce", 0, 0),
    "allgather_": ("all-gather", 1, 0),
    "_allgather_base_": ("all-gather", 1, 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 1, 0),
    "reduce_scatter_": ("reduce-scatter", 1, 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 0),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 0),
    "alltoall_base_": (ALL_TO_ALL, 1, 0),
    "alltoall_": (ALL_TO_ALL, 1, 0),
    "gather_": ("gather", 1, None),
    "scatter_": ("scatter", None, 0),
    "barrier": ("barrier", None, None),
    "monitored_barrier_": ("barrier", None, None),
    "send": (SEND, 0, None),
    "recv_": (RECEIVE, None, 0),
}
_PEERS = {"send": "dst", "recv_": "src"}


class Recorder(TorchDispatchMode):
    """Tells of each call of this process for as long as it is entered.

    Args:
        tell: called before the call is made, which may never return.
    """

    def __init__(self, tell: Callable[[Call], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Tell of a call between processes, then make it; make any other."""
        del types
        if operator.namespace == "c10d":
            named = _named(operator, args, kwargs or {})
            group: dist.ProcessGroup = dist.ProcessGroup.unbox(named["process_group"])
            if group.size() > 1:
                self._tell(_call(operator._schema.name.rpartition("::")[2], named, group))
        return operator(*args, **(kwargs or {}))


def _named(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [one.name for one in operator._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _call(name: str, named: dict[str, Any], group: dist.ProcessGroup) -> Call:
    assert name in _OPERATORS, f"torch has a call between processes that is not known here: {name}"
    kind, given_at, taken_at = _OPERATORS[name]
    values = list(named.values())
    ranks = dist.get_process_group_ranks(group)
    given = [] if given_at is None else list(_tensors(values[given_at]))
    taken = [] if taken_at is None else list(_tensors(values[taken_at]))
    root = named.get(_PEERS.get(name, "root_rank"))
    return Call(
        kind,
        (group.group_desc if group.group_desc != "undefined" else group.group_name, tuple(ranks)),
        given=tuple(map(_size, given)),
        taken=tuple(map(_size, taken)),
        bytes=sum(one.nbytes for one in given),
        peer=None if root is None else ranks[root],
        splits=_splits(named, given, taken, len(ranks)) if kind == ALL_TO_ALL else None,
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for one in value:
            yield from _tensors(one)


def _size(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _splits(
    named: Mapping[str, Any], given: Sequence[Tensor], taken: Sequence[Tensor], size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the rows that go to each member and come from each; without any, they are even."""

    def of(splits: Iterable[int] | None, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        if len(tensors) > 1:
            return tuple(len(one) for one in tensors)
        return tuple(splits or ()) or (len(tensors[0]) // size,) * size

    return of(named.get("input_split_sizes"), given), of(named.get("output_split_sizes"), taken)
