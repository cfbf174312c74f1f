"""Finds where a loss or a gradient stopped being finite."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hybrid_train.checkpoint.places import bare
from hybrid_train.megatron.data_parallel import Chunks, non_finite_gradients
from hybrid_train.schema.problems import UserError


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite. Both are sums over all processes."""

    everywhere = True
    kind = "nonfinite"


def raise_bad_norm(norm: float) -> None:
    """Stop before the optimizer touches anything."""
    raise NonFiniteError(f"the gradient norm is {norm}")


def first_bad_module(chunks: Chunks, replay: Callable[[], None], *, stage: int = 0) -> str:
    """Name rank and module where the numbers went bad; every process calls this.

    Args:
        chunks: the model chunks of this process; gradients still in their buffers.
        replay: repeats the forward pass of the step on all processes.
        stage: pipeline stage of this process.
    """
    in_gradients = non_finite_gradients(chunks)
    found = _found_in_forward(chunks, replay)
    # Bad gradients spread from the loss towards the input: the last module has them first.
    sighting = found and (stage, *found)
    mine = (sighting, in_gradients[-1] if in_gradients else None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    # What goes bad on one tensor rank is bad on the others a few modules later.
    seen = [(*one, rank) for rank, (one, _) in enumerate(everyone) if one is not None]
    if seen:
        *_, module, rank = min(seen, key=lambda one: (one[0], one[1], one[-1]))
        return f"first in the forward pass on rank {rank}, module {module}"
    for rank, (_, parameter) in reversed(list(enumerate(everyone))):
        if parameter is not None:
            return f"first in the backward pass on rank {rank}, parameter {parameter}"
    return "the forward pass, repeated, does not show it"


def _found_in_forward(chunks: Chunks, replay: Callable[[], None]) -> tuple[int, str] | None:
    """Return the first module with a bad output, and how many were called until then."""
    bad: list[tuple[int, str]] = []
    calls = itertools.count()

    def listen(name: str) -> Callable[..., None]:
        def after(module: torch.nn.Module, _: Any, output: Any) -> None:
            call = next(calls)
            tensors = output if isinstance(output, tuple) else (output,)
            if any(_is_bad(tensor) for tensor in tensors):
                own = module.named_parameters(recurse=False)
                ill = [f"its {part}" for part, parameter in own if _is_bad(parameter)]
                bad.append((call, f"{name} ({', '.join(ill)} not finite)" if ill else name))

        return after

    handles = [
        module.register_forward_hook(listen(name))
        for chunk in chunks
        for name, module in bare(chunk).named_modules()
        if name and not any(True for _ in module.children())
    ]
    replay()
    for handle in handles:
        handle.remove()
    return bad[0] if bad else None


def _is_bad(value: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
        return False
    return not bool(torch.isfinite(value).all())
