"""Edits: what changes a built model before it is wrapped, and how several meet in a linear layer.

Edits act in the order of their stages. In a linear layer they meet in its `EditedLinear`, while its
parameters stay as they are, so checkpoints know nothing of it. A linear of Transformer Engine takes
its weight into its own kernels, where nothing can be put before the GEMM: it is refused by name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from hybrid_train.anatomy.gemm_formats import Linear
from hybrid_train.megatron.plain import GroupedLinear, linear_modules
from hybrid_train.precision.audit import is_te_linear
from hybrid_train.precision.emulated import (
    EditedLinear,
    Emulation,
    OperandTransform,
    Stage,
)
from hybrid_train.schema.problems import UserError


class Edit(Protocol):
    """Changes the chunks of a model; every process makes the same calls."""

    @property
    def stage(self) -> Stage:
        """When it acts."""

    def apply(self, chunks: Sequence[Module]) -> None:
        """Change the chunks of this process, as they were built, before they are wrapped."""


class Freeze:
    """The edit that leaves weights as they are: no gradient, no optimizer, no weight decay."""

    stage = Stage.freeze

    def __init__(self, prefix: str) -> None:
        """Take what the names of these weights begin with."""
        self._prefix = prefix

    def apply(self, chunks: Sequence[Module]) -> None:
        """Freeze those of this process."""
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if name.startswith(self._prefix):
                    parameter.requires_grad_(False)


def apply_edits(edits: Iterable[Edit], chunks: Sequence[Module]) -> None:
    """Let edits change a model, in the order of their stages, whatever order they come in."""
    for edit in sorted(edits, key=lambda edit: edit.stage):
        edit.apply(chunks)


def linears_of(chunks: Iterable[Module]) -> Iterator[tuple[Linear, Module]]:
    """Yield the linear layers of several chunks."""
    for chunk in chunks:
        yield from linear_modules(chunk)


def add_transform(linear: Linear, module: Module, transform: OperandTransform) -> None:
    """Put a transform before the GEMM of a linear layer, behind those of earlier stages.

    Raises:
        UserError: if the layer is one of Transformer Engine.
    """
    if is_te_linear(module):
        raise UserError(
            f"{linear.module} of layer {linear.layer} is a linear of Transformer Engine, whose "
            "operands no edit can change: set runtime.kernels=plain (precision.backend=emulated "
            "where GEMMs are quantized)"
        )
    edited = edits_of(module) or EditedLinear()
    edited.transforms = sorted([*edited.transforms, transform], key=lambda one: one.stage)
    _install(module, edited)


def quantize(module: Module, emulations: Sequence[Emulation]) -> None:
    """Let the GEMM of a linear layer multiply quantized operands; none: undo that."""
    edited = edits_of(module) or EditedLinear()
    edited.emulations = emulations
    _install(module, edited)


def edits_of(module: Module) -> EditedLinear | None:
    """Return what edits make of a linear layer; None where it is as it was built."""
    found: EditedLinear | None = getattr(module, "edited", None)
    return found


def emulations_of(module: Module) -> list[Emulation]:
    """Return how a linear layer is emulated, experts one by one; nothing where it is not."""
    edited = edits_of(module)
    return [] if edited is None else list(edited.emulations)


def _install(module: Module, edited: EditedLinear) -> None:
    """Let a layer multiply by way of its edits; without any it is as it was built."""
    idle = not edited.transforms and not edited.emulations
    module.edited = None if idle else edited  # type: ignore[assignment]


class _Watch(OperandTransform):
    """Shows somebody the inputs of a GEMM, and changes nothing."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        self._see = see

    def input(self, x: Tensor) -> Tensor:
        self._see(x)
        return x


def watch_input(module: Module, see: Callable[[Tensor], None]) -> Callable[[], None]:
    """Let somebody see what a linear layer multiplies, [..., I] on this rank; return what ends it.

    Plain experts hold weights alone and are asked for them without tokens; there the input is seen
    where edits see it.
    """
    if not isinstance(module, GroupedLinear):

        def show(_: Module, arguments: tuple[Any, ...]) -> None:
            see(arguments[0])

        return module.register_forward_pre_hook(show).remove
    edited, watch = edits_of(module) or EditedLinear(), _Watch(see)
    edited.transforms = [*edited.transforms, watch]
    _install(module, edited)

    def end() -> None:
        edited.transforms = [one for one in edited.transforms if one is not watch]
        _install(module, edited)

    return end
