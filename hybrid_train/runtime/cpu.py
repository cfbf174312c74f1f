"""Lets code written for CUDA run on a CPU: each CUDA call of Megatron-Core has a stand-in here.

Installed once, before megatron.core is imported, and only where the user runs on the CPU. It
changes `torch` for the whole process, so it refuses to work beside a visible GPU.
"""

import contextlib
import ctypes
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hybrid_train.runtime.replacements import COLLECTIVES, DEVICE_CALLS, FACTORIES, TENSORS
from hybrid_train.schema.problems import UserError

_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.meta.FloatTensor": "torch.cuda.FloatTensor",
    "torch.meta.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.meta.HalfTensor": "torch.cuda.HalfTensor",
}
_TENSOR_NAMES = ("tensor", "output_tensor", "output", "input_tensor", "input")  # of collectives
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # options of mallopt in malloc.h
_installed = False
_at_once = False  # whether a collective is over when the call returns


class _Here(str):
    """The current device, "cpu" or "meta"; the first of its kind where core writes f"cuda:{...}".

    Megatron-FSDP makes such a torch.device (core 0.19.2, mcore_fsdp_adapter.py 156 and
    megatron_fsdp.py 234), which any number satisfies; what is put there goes to the CPU.
    """

    def __format__(self, _: str) -> str:
        return "0"


_here = _Here("cpu")  # where goes what core puts on a GPU


class _Stream:
    """A queue of work: on a CPU everything is already done."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait_stream(self, _: object) -> None:
        pass

    def wait_event(self, _: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event(_Stream):
    """A point in a queue of work."""

    def record(self, *_: object) -> None:
        pass

    def wait(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        return True


_STREAM = _Stream()


@contextlib.contextmanager
def _no_context(*_: object, **__: object) -> Iterator[None]:
    yield


def _nothing(*_: object, **__: object) -> None:
    return None


def _on_cpu(device: Any) -> Any:
    """Replace a CUDA device by what stands for it, whatever way it is written."""
    if device is None or isinstance(device, int):
        return str(_here) if device is not None else None
    return str(_here) if str(device).startswith("cuda") else device


def _redirect(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return factory(*args, **kwargs)

    return on_cpu


def _module_to(move: Callable[..., Any]) -> Callable[..., Any]:
    """Let modules stay where they are when core sends them to a GPU (megatron_fsdp.py 251)."""

    @functools.wraps(move)
    def to_cpu(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        where = [_on_cpu(arg) if isinstance(arg, torch.device | str) else arg for arg in args]
        return move(module, *where, **kwargs)

    return to_cpu


def _mesh_on_cpu(from_group: Callable[..., Any]) -> Callable[..., Any]:
    """Make meshes of groups of the CPU where core names CUDA (mcore_fsdp_adapter.py 409 to 449)."""

    @functools.wraps(from_group)
    def mesh(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, _on_cpu(device_type), *args, **kwargs)

    return mesh


def random_state(*_: object, **__: object) -> torch.Tensor:
    """Stand for the state of a CUDA generator."""
    return torch.get_rng_state()


def set_random_state(state: torch.Tensor, *_: object, **__: object) -> None:
    """Set what stands for the state of a CUDA generator."""
    torch.set_rng_state(state)


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Report the CUDA spelling of a tensor's type, which Megatron's optimizers look for."""

    def typed(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _TYPE_NAMES.get(result, result) if isinstance(result, str) else result

    return typed


def _splits_as_lists(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """Gloo wants lists of ints where NCCL also takes arrays and tensors."""

    def as_list(splits: Any) -> list[int] | None:
        return None if splits is None else [int(n) for n in splits]

    @functools.wraps(all_to_all)
    def exchange(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return all_to_all(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )

    return exchange


def _gather_uneven(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Let ranks give different numbers of rows, which NCCL takes and gloo does not."""

    @functools.wraps(all_gather)
    def gather(
        parts: list[torch.Tensor], given: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        shapes = {part.shape for part in parts}
        if len(shapes) == 1:
            return all_gather(parts, given, group=group, async_op=async_op)
        assert not async_op, "an uneven gather is over when it returns"
        most = max(map(len, parts))
        whole = given.new_empty(len(parts) * most, *given.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, _with_rows(given, most), group=group)
        for part, padded in zip(parts, whole.chunk(len(parts)), strict=True):
            part.copy_(padded[: len(part)])
        return None

    return gather


def _scatter_uneven(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Let ranks take different numbers of rows, which NCCL gives and gloo does not."""

    @functools.wraps(reduce_scatter)
    def scatter(
        output: torch.Tensor,
        parts: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        shapes = {part.shape for part in parts}
        if len(shapes) == 1:
            return reduce_scatter(output, parts, op, group=group, async_op=async_op)
        assert not async_op, "an uneven scatter is over when it returns"
        most = max(map(len, parts))
        own = output.new_empty(most, *output.shape[1:])
        padded = torch.cat([_with_rows(part, most) for part in parts])
        torch.distributed.reduce_scatter_tensor(own, padded, op=op, group=group)
        output.copy_(own[: len(output)])
        return None

    return scatter


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Add rows of zeros at the end."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


class _Done:
    """Handle of a collective that is over."""

    def wait(self, *_: object, **__: object) -> bool:
        return True


def _keep(*_: object) -> None:
    """What a reduction over one process does."""


def _copy(output: torch.Tensor, given: torch.Tensor) -> None:
    """What a gather or a scatter over one process does; in place, as Megatron calls it, nothing."""
    if output.data_ptr() != given.data_ptr():
        output.copy_(given)


def _skip_alone(collective: Callable[..., Any], alone: Callable[..., None]) -> Callable[..., Any]:
    """Do without gloo in a group of one, where it copies every buffer twice."""

    @functools.wraps(collective)
    def maybe(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size(group) > 1:
            work = collective(*args, group=group, async_op=async_op, **kwargs)
            if _at_once and work is not None:
                work.wait()
            return work
        alone(*args[:2], *(kwargs[name] for name in _TENSOR_NAMES if name in kwargs))
        return _Done() if async_op else None

    return maybe


def finish_collectives_at_once(yes: bool) -> None:
    """Let no collective go on behind its caller, for code that counts on the order of streams."""
    global _at_once
    _at_once = yes


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Let nothing that is made in the block have memory: torch's meta device stands for a GPU.

    The calls are redirected already. Tensors then have sizes and formats, and no values.
    """
    global _here
    before, _here = _here, _Here("meta")
    try:
        with torch.device("meta"):
            yield
    finally:
        _here = before


@contextlib.contextmanager
def one_by_one(*_: object, **__: object) -> Iterator[_Done]:
    """Stand for torch's manager that gathers collectives into one."""
    yield _Done()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step instead of giving each back to the system.

    Otherwise every large temporary is mapped and zeroed anew. Elsewhere than on glibc, nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 1 << 30)):
        mallopt(option, value)


def install() -> None:
    """Redirect CUDA calls to the CPU for the rest of this process.

    Raises:
        UserError: if a GPU is visible; its real calls would be hidden.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise UserError(
            "runtime.device=cpu, but a GPU is visible to this process; hide it "
            "(CUDA_VISIBLE_DEVICES=) or use runtime.device=cuda"
        )
    _note_factories()
    _redirect_device_calls()
    _redirect_tensors()
    _redirect_collectives()
    _installed = True


def _uncompiled(function: Callable[..., Any] | None = None, **_: object) -> Any:
    """Stand in for torch.compile: compiling core's small helpers takes 9 to 38 s on a CPU."""
    return function if function is not None else (lambda decorated: decorated)


def _redirect_device_calls() -> None:
    DEVICE_CALLS.put(
        current_device=lambda: _here,
        **dict.fromkeys(("set_device", "synchronize", "empty_cache"), _nothing),
        Stream=_Stream,
        Event=_Event,
        **dict.fromkeys(("current_stream", "default_stream"), lambda *_: _STREAM),
        **dict.fromkeys(("stream", "device"), _no_context),
        is_current_stream_capturing=lambda: False,
        get_rng_state=random_state,
        set_rng_state=set_random_state,
        manual_seed=torch.default_generator.manual_seed,
        manual_seed_all=_nothing,  # torch.manual_seed calls it
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    )


def _note_factories() -> None:
    """Let torch list its factories, which it does once: `with torch.device(...)` knows those alone.

    Without it a model of transformers, which is built on the meta device, keeps values of angles
    that it takes for initialised, and drops them with the device.
    """
    with torch.device("cpu"):
        torch.empty(0)


def _redirect_tensors() -> None:
    TENSORS.put(
        Tensor__cuda=lambda self, *_, **__: self,
        Tensor__type=_tensor_type(torch.Tensor.type),
        nn__Module__to=_module_to(torch.nn.Module.to),
        compile=_uncompiled,
        **{name: _redirect(getattr(torch, name)) for name in FACTORIES},
    )


def _redirect_collectives() -> None:
    gloo: Any = torch.distributed
    COLLECTIVES.put(
        DeviceMesh__from_group=staticmethod(_mesh_on_cpu(gloo.DeviceMesh.from_group)),
        all_to_all_single=_splits_as_lists(gloo.all_to_all_single),
        all_gather=_gather_uneven(gloo.all_gather),
        reduce_scatter=_scatter_uneven(gloo.reduce_scatter),
        all_reduce=_skip_alone(gloo.all_reduce, _keep),
        all_gather_into_tensor=_skip_alone(gloo.all_gather_into_tensor, _copy),
        reduce_scatter_tensor=_skip_alone(gloo.reduce_scatter_tensor, _copy),
    )
