"""Tensors that modules hold for a while in place of their parameters.

Megatron says where a parameter belongs in the whole model by what the modules hold. A weight that
has no memory of its own, or none that could be cut into its parts, is asked for by a stand-in.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core import fp8_utils
from torch import Tensor
from torch.nn import Module, Parameter


def is_in_fp8(weight: Tensor) -> bool:
    """Tell whether a weight is kept in FP8, by us or by Transformer Engine."""
    return bool(fp8_utils.is_float8tensor(weight))


@contextlib.contextmanager
def stand_ins(
    model: Module, make: Callable[[Tensor], Tensor | None], weight: Callable[[Tensor], Tensor]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let the modules of a model hold other tensors in place of parameters.

    Args:
        model: any module.
        make: weight -> what stands for it, once for a weight that several modules share; None:
            nothing does.
        weight: parameter of a module -> the weight that is meant.

    Yields:
        Each weight and what stands for it.
    """
    made: dict[int, Tensor | None] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    held: list[tuple[Module, str, Parameter]] = []
    for module in model.modules():
        for name, current in module._parameters.items():
            if current is None:
                continue
            meant = weight(current)
            if id(meant) not in made:
                stand_in = made[id(meant)] = make(meant)
                pairs += [] if stand_in is None else [(meant, stand_in)]
            if made[id(meant)] is not None:
                held.append((module, name, current))
    try:
        for module, name, current in held:
            module._parameters[name] = made[id(weight(current))]  # type: ignore[assignment]
        yield pairs
    finally:
        for module, name, current in held:
            module._parameters[name] = current


@contextlib.contextmanager
def plain_weights(
    model: Module, *, without_memory: bool = False
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let empty tensors stand for the weights in FP8, in the type that those claim to have.

    Args:
        model: any module.
        without_memory: ask for places alone, where values do not matter.

    Yields:
        Each weight in FP8 and what stands for it.
    """

    def make(parameter: Tensor) -> Tensor | None:
        if not is_in_fp8(parameter):
            return None
        return empty_like(parameter, "meta" if without_memory else parameter.device)

    with stand_ins(model, make, weight=lambda parameter: parameter) as pairs:
        yield pairs


def empty_like(parameter: Tensor, device: torch.device | str) -> Parameter:
    """Return a parameter without values that Megatron takes for the same one, split likewise."""
    empty = Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    vars(empty).update(vars(parameter))
    return empty
