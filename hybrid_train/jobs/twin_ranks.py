"""The ranks of a twin: forked on this machine under gloo, one step each, their calls recorded.

Each rank goes the way of a training run: it joins the group, builds groups, model and engine, and
takes a step on tokens drawn at random. It tells of each call before it makes it. So the calls are
known of a rank that hangs or crashes, too, and all are ended as soon as nobody calls any more.

Each collective and transfer passes torch's dispatcher as an operator of the namespace `c10d`,
whoever calls it: there it is recorded. Calls of a group of one are left out.
"""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_train.config import launcher
from hybrid_train.data.batch import Batch
from hybrid_train.jobs.networks import build_engine
from hybrid_train.megatron.data_parallel import build_groups
from hybrid_train.model.build import build_model
from hybrid_train.planning.agreement import ALL_TO_ALL, RECEIVE, SEND, Call
from hybrid_train.planning.twin import twin_of
from hybrid_train.runtime.start import process
from hybrid_train.schema.train import TrainJob

_HOST = "127.0.0.1"
_SILENCE_S = 30.0  # without a call of any rank: the ranks hang
_AFTER_FAILURE_S = 5.0  # the same once a rank has failed


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


@dataclass(frozen=True)
class Recorded:
    """The calls of all ranks in a step, and the words of those that did not reach its end."""

    calls: dict[int, list[Call]]
    failures: dict[int, str]


def record(
    job: TrainJob, processes: int, around: Callable[[], Any] = contextlib.nullcontext
) -> Recorded:
    """Take a step of the twin of a run on this machine.

    This process must not have computed anything yet: a fork does not take its threads along.

    Args:
        job: of one phase, at its true size.
        processes: of the run.
        around: makes what each rank is in while it builds and steps.
    """
    job, processes = twin_of(job, processes)
    fork, port = get_context("fork"), _free_port()
    ends = [fork.Pipe(duplex=False) for _ in range(processes)]
    ranks = [
        fork.Process(
            target=_serve, args=(job, rank, processes, port, ends[rank][1], around), daemon=True
        )
        for rank in range(processes)
    ]
    for one in ranks:
        one.start()
    for _, writable in ends:
        writable.close()  # of this process: the end of a rank is the end of its pipe
    try:
        return _gathered([readable for readable, _ in ends])
    finally:
        for one in ranks:
            one.kill()
            one.join()


def _gathered(ends: list[Any]) -> Recorded:
    """Listen to the ranks until all are done, or nobody has said anything for long."""
    calls: dict[int, list[Call]] = {rank: [] for rank in range(len(ends))}
    failures: dict[int, str] = {}
    left = {end: rank for rank, end in enumerate(ends)}
    while left:
        ready = connection.wait(list(left), _AFTER_FAILURE_S if failures else _SILENCE_S)
        if not ready:
            silent = f"waits: it has made no call for {_SILENCE_S:g} s"
            return Recorded(calls, failures | dict.fromkeys(left.values(), silent))
        for end in ready:
            rank, said = left[end], _heard(end)
            if isinstance(said, Call):
                calls[rank].append(said)
                continue
            del left[end]
            if said:
                failures[rank] = said
    return Recorded(calls, failures)


def _heard(end: Any) -> Call | str:
    """Return what a rank says: a call, or at its end why it failed, nothing if it did not."""
    try:
        said: Call | str = end.recv()
    except EOFError:
        return "ended without a word"
    return said


def _serve(
    job: TrainJob, rank: int, processes: int, port: int, end: Any, around: Callable[[], Any]
) -> None:
    """Be a rank: tell of each call, and in the end what went wrong."""
    logging.disable()  # eight logs of the twin would hide its result
    os.environ |= {
        launcher.RANK: str(rank),
        launcher.WORLD_SIZE: str(processes),
        launcher.LOCAL_RANK: str(rank),
        launcher.LOCAL_WORLD_SIZE: str(processes),
        launcher.MASTER_ADDR: _HOST,
        launcher.MASTER_PORT: str(port),
    }
    words = ""
    try:
        with process(job.runtime, job.train.seed) as device, around(), Recorder(end.send):
            _step(job, device)
            end.send("")
            signal.pause()  # others may still take what this rank has sent
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    end.send(words)


def _step(job: TrainJob, device: torch.device) -> None:
    """Build this rank and take a step."""
    assert job.model.vocab_size is not None, "a twin has one"
    groups = build_groups(job.parallel, job.runtime.timeout_s)
    built = build_model(job, groups, job.model.vocab_size, on_gpu=False)
    engine = build_engine(job, built, groups, device)
    batches = _batches(job, groups.dp.rank())
    engine.step(batches, tokens_seen=0)


def _batches(job: TrainJob, data_rank: int) -> Iterator[Batch]:
    """Yield microbatches of tokens at random, the same on all ranks that read the same rows."""
    train, generator = job.train, torch.Generator().manual_seed(data_rank)
    shape = train.microbatch, train.sequence_length
    places = torch.arange(train.sequence_length).expand(shape)
    while True:
        rows = torch.randint(
            job.model.vocab_size or 1, (shape[0], shape[1] + 1), generator=generator
        )
        yield Batch(rows[:, :-1], rows[:, 1:], torch.ones(shape), places)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port: int = free.getsockname()[1]
        return port


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
