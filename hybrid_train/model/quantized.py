"""Quantized products in the plain layers of a model: which layer multiplies how, step by step."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Module, Parameter

from hybrid_train.anatomy.product_formats import Linear, formats_of, kept_in_fp8
from hybrid_train.model import megatron, plain
from hybrid_train.model.linears import linear_modules
from hybrid_train.precision.emulated import Emulation, emulation_of, quantized_linear
from hybrid_train.precision.fp8_weights import in_fp8
from hybrid_train.precision.recipes import schemes
from hybrid_train.precision.records import Records
from hybrid_train.precision.schemes import Scheme
from hybrid_train.schema.model import Model
from hybrid_train.schema.precision import Precision, Product

if TYPE_CHECKING:
    from hybrid_train.precision.delayed import AmaxHistory


class QuantizedProducts:
    """Emulates the quantized products of the chunks of this process.

    Every process makes the same calls. The random bits of a step depend on seed, step and rank
    alone, so a resumed run has those of a run that never stopped.
    """

    def __init__(self, chunks: Sequence[Module], seed: int, group: dist.ProcessGroup) -> None:
        """Take the chunks of this process.

        Args:
            chunks: as they were built, before they are wrapped.
            seed: of the run.
            group: ranks that agree on the largest values of a step (fp8_delayed): those of the
                same pipeline stage.
        """
        self._chunks = chunks
        self._seed = seed
        self._group = group
        self.records = Records()
        self.histories: list[AmaxHistory] = []  # in the same order on all ranks of the group

    def use(self, model: Model, precision: Precision) -> None:
        """Let every linear layer multiply in its format; what another phase asked is undone."""
        formats = formats_of(model, precision)
        for linear, module in self._linears():
            chosen = formats[linear]
            make = partial(emulation_of, linear, chosen, precision, self.records)
            if isinstance(module, plain.GroupedLinear):
                how = [make(rows_vary=True) for _ in range(module.num_experts)]
                module.emulations = how if chosen.quantized else None
            elif isinstance(module, plain.DuplicatedLinear):
                module.emulation = make() if chosen.quantized else None
            elif chosen.quantized:
                module._forward_impl = partial(_split_linear, make())  # type: ignore[assignment]
            else:
                vars(module).pop("_forward_impl", None)  # the method of its class shows again
        self.histories = [
            history
            for _, module in self._linears()
            for how in emulations_of(module)
            for history in how.histories.values()
        ]

    def keep_weights_in_fp8(self, model: Model, precision: Precision) -> None:
        """Let the layers that are to keep their weights in FP8 do so; before buffers are made."""
        kept = kept_in_fp8(model, precision)
        if not kept:
            return
        megatron.use_fp8_weights()
        for linear, module in self._linears():
            if linear not in kept:
                continue
            found = schemes(kept[linear], Product.fprop, precision)
            assert found is not None, "only quantized formats are kept"
            for name, weight in module.named_parameters():
                if name.startswith("weight"):  # of a norm in front of the product there may be one
                    module._parameters[name] = _as_fp8(weight, found[1])

    def start_step(self, step: int) -> None:
        """Set the random bits of a step, and what fp8_delayed has seen in it: nothing yet."""
        self.records.noise.start_step(self._seed, step, dist.get_rank())
        for history in self.histories:
            history.forget()

    def end_step(self) -> None:
        """End a step of fp8_delayed: the ranks agree on the largest values that they saw."""
        if not self.histories:
            return
        seen = torch.stack([history.seen for history in self.histories])
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        for history, amax in zip(self.histories, seen, strict=True):
            history.roll(amax)

    def _linears(self) -> Iterator[tuple[Linear, Module]]:
        for chunk in self._chunks:
            yield from linear_modules(chunk)


def _as_fp8(weight: Parameter, scheme: Scheme) -> Parameter:
    kept = Parameter(in_fp8(weight, scheme))
    vars(kept).update(vars(weight))  # by which Megatron knows how it is split
    return kept


def emulations_of(module: Module) -> list[Emulation]:
    """Return how a linear layer is emulated, experts one by one; nothing where it is not."""
    if isinstance(module, plain.GroupedLinear):
        return list(module.emulations or ())
    if isinstance(module, plain.DuplicatedLinear):
        return [] if module.emulation is None else [module.emulation]
    forward = vars(module).get("_forward_impl")
    return [] if forward is None else [forward.args[0]]


def _split_linear(  # noqa: PLR0913 - the arguments of core's
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
