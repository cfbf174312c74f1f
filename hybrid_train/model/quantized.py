"""Quantized products in the plain layers of a model: which layer multiplies how, and its hooks."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module

from hybrid_train.config.product_formats import formats_of
from hybrid_train.config.schema.model import Model
from hybrid_train.config.schema.precision import Precision
from hybrid_train.model import plain
from hybrid_train.model.linears import linear_modules
from hybrid_train.precision.delayed import AmaxHistory
from hybrid_train.precision.emulated import Emulation, emulation_of, quantized_linear


def install(chunks: Iterable[Module], model: Model, precision: Precision) -> None:
    """Let every linear layer multiply in its format, emulated; one of another phase is undone."""
    formats = formats_of(model, precision)
    for chunk in chunks:
        for linear, module in linear_modules(chunk):
            chosen = formats[linear]
            if isinstance(module, plain.GroupedLinear):
                how = [emulation_of(linear, chosen, precision) for _ in range(module.num_experts)]
                module.emulations = how if chosen.quantized else None
            elif isinstance(module, plain.DuplicatedLinear):
                one = emulation_of(linear, chosen, precision)
                module.emulation = one if chosen.quantized else None
            elif chosen.quantized:
                one = emulation_of(linear, chosen, precision)
                module._forward_impl = partial(_split_linear, one)  # type: ignore[assignment]
            else:
                vars(module).pop("_forward_impl", None)  # the method of its class shows again


def emulations(chunks: Iterable[Module]) -> list[Emulation]:
    """Return how the linear layers of this process are emulated, experts one by one, in order."""
    found: list[Emulation] = []
    for chunk in chunks:
        for _, module in linear_modules(chunk):
            forward = vars(module).get("_forward_impl")
            found += [forward.args[0]] if forward is not None else []
            found += getattr(module, "emulations", None) or []
            found += [one] if (one := getattr(module, "emulation", None)) else []
    return found


def _split_linear(
    how: Emulation,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> Tensor:
    """Stand for core's linear function (layers.py 755): gather, multiply, reduce on the way back.

    A gathered tensor is quantized as a whole, as Transformer Engine does.
    """
    assert bias is None, "the family has no linear bias"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    buffer = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
    if buffer is not None:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return quantized_linear(input, weight, how, buffer)


def roll_histories(histories: Sequence[AmaxHistory], group: dist.ProcessGroup) -> None:
    """End a step of fp8_delayed: all ranks of a group agree on the largest values they saw."""
    if not histories:
        return
    seen = torch.stack([history.seen for history in histories])
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    for history, amax in zip(histories, seen, strict=True):
        history.roll(amax)
