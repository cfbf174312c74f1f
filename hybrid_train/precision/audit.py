"""What a network's GEMMs really multiply: notes, rounding statistics, and what tells them.

Plain layers tell the audit of their network themselves; the layers of Transformer Engine are
listened to. These call one function for each GEMM, in a layout that says which: TN is the forward
GEMM, NN the gradient of the input, NT that of the weight; the first operand is the weight but for
the last, where it is the input (pytorch/module/linear.py 632, 1424 and 1630 of version 2.20.2).
The operands are objects whose class and quantizer are what is multiplied, whatever was asked.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.anatomy.gemm_formats import Linear
from hybrid_train.precision import te
from hybrid_train.precision.formats import Noise
from hybrid_train.precision.operands import OperandStatistics
from hybrid_train.precision.recipes import (
    Element,
    Operand,
    Scale,
    Scheme,
    Shape,
)
from hybrid_train.schema.precision import Gemm

# The formats of both operands in words; experts of one layer multiply alike, or show up twice.
Seen = dict[tuple[Linear, Gemm], set[tuple[str, str]]]
Counted = dict[tuple[Linear, Gemm, Operand], OperandStatistics]
# Layout of a call of Transformer Engine -> the GEMM that it asks for.
_GEMMS = {"TN": Gemm.fprop, "NN": Gemm.dgrad, "NT": Gemm.wgrad}
# Module of Transformer Engine -> the function that multiplies, by the name that it has there.
_CALLS = {
    "linear": "general_gemm",
    "layernorm_linear": "general_gemm",
    "grouped_linear": "general_grouped_gemm",
}


class Audit:
    """What linear layers really multiplied, GEMM by GEMM.

    Takes notes while it listens; costs nothing otherwise.
    """

    def __init__(self) -> None:
        self.listening = False
        self._seen: Seen = {}

    def start(self) -> None:
        """Begin to listen."""
        self.listening, self._seen = True, {}

    def stop(self) -> Seen:
        """Return what was noted, and listen no more."""
        self.listening = False
        return self._seen

    def note(self, linear: Linear, gemm: Gemm, left: str, right: str) -> None:
        """Note the formats of the two operands that a GEMM is about to multiply."""
        if self.listening:
            self._seen.setdefault((linear, gemm), set()).add((left, right))


class Statistics:
    """Underflow, saturation and error of quantized operands.

    Hands out what quantization counts into while it listens; costs nothing otherwise.
    """

    def __init__(self) -> None:
        self._listening = False
        self._counted: Counted = {}

    def start(self) -> None:
        """Begin to listen."""
        self._listening, self._counted = True, {}

    def stop(self) -> Counted:
        """Return what was counted, and listen no more."""
        self._listening = False
        return self._counted

    def of(self, linear: Linear, gemm: Gemm, operand: Operand) -> OperandStatistics | None:
        """Return where to count an operand; None where nobody listens."""
        if not self._listening:
            return None
        return self._counted.setdefault((linear, gemm, operand), OperandStatistics())


@dataclass(frozen=True)
class Records:
    """What is noted of one network's GEMMs, and the noise that rounds them; no other shares it."""

    audit: Audit = field(default_factory=Audit)
    statistics: Statistics = field(default_factory=Statistics)
    noise: Noise = field(default_factory=Noise)


def type_in_words(kind: torch.dtype) -> str:
    """Say what an operand is that is not quantized: "bfloat16"."""
    return str(kind).removeprefix("torch.")


def is_te_linear(module: Module) -> bool:
    """Tell whether a linear layer of a model is core's around Transformer Engine's."""
    return hasattr(module, "te_quant_params")  # extensions/transformer_engine.py 1017


def observe_te_linears(pairs: Iterable[tuple[Linear, Module]], audit: Audit) -> Callable[[], None]:
    """Tell an audit of every GEMM of these layers.

    Args:
        pairs: layers of Transformer Engine, and what they are in the model.
        audit: of the network that they are part of.

    Returns:
        What to call when the step is over.
    """
    calls = [(te.linear_module(name), function) for name, function in _CALLS.items()]
    return observe_calls(pairs, calls, audit)


def observe_calls(
    pairs: Iterable[tuple[Linear, Module]], calls: Iterable[tuple[ModuleType, str]], audit: Audit
) -> Callable[[], None]:
    """Do what `observe_te_linears` does, for functions that stand in given modules.

    A forward GEMM belongs to the layer that is being called; a backward one to the layer whose
    output was the last to get its gradient, since autograd runs its backward pass right after.
    """
    running = _Running()
    undo: list[Callable[[], None]] = []
    for linear, module in pairs:
        undo.append(module.register_forward_pre_hook(running.enter(linear)).remove)
        undo.append(module.register_forward_hook(running.leave(linear)).remove)
    for place, name in calls:
        original = getattr(place, name)
        setattr(place, name, _telling(original, running, audit))
        undo.append(functools.partial(setattr, place, name, original))

    def stop() -> None:
        for one in undo:
            one()

    return stop


class _Running:
    """The layer at work in each direction; None for one that nobody listens to."""

    def __init__(self) -> None:
        self.forward: Linear | None = None
        self.backward: Linear | None = None

    def enter(self, linear: Linear) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.forward = linear

        return enter

    def leave(self, linear: Linear) -> Callable[..., None]:
        def begin_backward(_: Tensor) -> None:
            self.backward = linear

        def leave(_: Module, __: Any, output: Any) -> None:
            self.forward = None
            result = output[0] if isinstance(output, tuple) else output
            if result.requires_grad:
                result.register_hook(begin_backward)

        return leave


def _telling(multiply: Callable[..., Any], running: _Running, audit: Audit) -> Callable[..., Any]:
    @functools.wraps(multiply)
    def told(first: Any, second: Any, *args: Any, **kwargs: Any) -> Any:
        gemm = _GEMMS[kwargs.get("layout", "TN")]
        linear = running.forward if gemm is Gemm.fprop else running.backward
        if linear is not None:
            for one, other in zip(_listed(first), _listed(second), strict=True):
                audit.note(linear, gemm, operand_in_words(other, gemm), operand_in_words(one, gemm))
        return multiply(first, second, *args, **kwargs)

    return told


def _listed(operand: Any) -> list[Any]:
    """Return the operands of a GEMM of several experts one by one."""
    return list(operand) if isinstance(operand, list | tuple) else [operand]


def operand_in_words(operand: Any, gemm: Gemm) -> str:
    """Say what an operand is, in the words of the recipes (`Scheme`)."""
    kind = next((name for name in _KINDS if _is_a(operand, name)), None)
    if kind is None:
        return type_in_words(operand.dtype)
    if operand._quantizer is None:
        return f"{kind}, how quantized is unknown"
    return str(_KINDS[kind](operand, gemm))


def _is_a(operand: Any, name: str) -> bool:
    """Tell whether a class, or one that it is made of, has a name."""
    return any(one.__name__ == name for one in type(operand).__mro__)


def _element(kind: Any) -> Element:
    """Translate Transformer Engine's name of an element (pytorch/constants.py 24)."""
    name = kind.name.lower()
    return next(one for one in Element if name.endswith(one.value))


def _float_scale(operand: Any) -> Scale:
    # A quantizer of delayed scaling has no such choice.
    power = getattr(operand._quantizer, "force_pow_2_scales", False)
    return Scale.power_of_two if power else Scale.fp32


def _per_tensor(operand: Any, _: Gemm) -> Scheme:
    return Scheme(_element(operand._fp8_dtype), _float_scale(operand), Shape.tensor)


def _blockwise(operand: Any, _: Gemm) -> Scheme:
    shape = Shape.square if operand._is_2D_scaled else Shape.vector
    return Scheme(_element(operand._fp8_dtype), _float_scale(operand), shape, 128)


def _mxfp8(operand: Any, _: Gemm) -> Scheme:
    return Scheme(_element(operand._fp8_dtype), Scale.e8m0, Shape.vector, 32)


def _nvfp4(operand: Any, gemm: Gemm) -> Scheme:
    """The transform is in the copies along tokens, which wgrad alone takes (common/recipe)."""
    quantizer = operand._quantizer
    return Scheme(
        _element(operand._fp4_dtype),
        Scale.e4m3,
        Shape.square if quantizer.with_2d_quantization else Shape.vector,
        16,
        stochastic=quantizer.stochastic_rounding,
        hadamard=quantizer.with_rht and gemm is Gemm.wgrad,
    )


# What the classes of pytorch/tensor/storage hold; those of pytorch/tensor are made of them.
_KINDS: dict[str, Callable[[Any, Gemm], Scheme]] = {
    "Float8TensorStorage": _per_tensor,
    "Float8BlockwiseQTensorStorage": _blockwise,
    "MXFP8TensorStorage": _mxfp8,
    "NVFP4TensorStorage": _nvfp4,
}
