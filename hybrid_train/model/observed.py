"""Notes what linear layers multiply that are not quantized, without a change to what they do."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module

from hybrid_train.anatomy.product_formats import Linear
from hybrid_train.megatron import plain
from hybrid_train.megatron.linears import linear_modules
from hybrid_train.model.edits import emulations_of
from hybrid_train.precision import native_audit
from hybrid_train.precision.records import Audit, type_in_words
from hybrid_train.schema.precision import Product


def observe(chunks: Iterable[Module], audit: Audit) -> Callable[[], None]:
    """Tell an audit of every product of layers that do not tell it themselves.

    Args:
        chunks: the model chunks of this process, in whatever they are wrapped.
        audit: of their network.

    Returns:
        What to call when the step is over.
    """
    handles, native = [], []
    for chunk in map(unwrapped, chunks):
        # Experts hand their weights out and are multiplied where both projections are at hand.
        homes: dict[Module, Module] = {
            part: experts
            for experts in chunk.modules()
            if isinstance(experts, plain.Experts)
            for part in (experts.linear_fc1, experts.linear_fc2)
        }
        for linear, module in linear_modules(chunk):
            if native_audit.is_native(module):
                native.append((linear, module))
            elif not emulations_of(module):
                home = homes.get(module, module)
                handles.append(home.register_forward_hook(_noting(linear, module, audit)))

    stop_native = native_audit.observe(native, audit) if native else None

    def stop() -> None:
        for handle in handles:
            handle.remove()
        if stop_native is not None:
            stop_native()

    return stop


def unwrapped(chunk: Module) -> Module:
    """Return the model itself, without what data parallelism and half precision put around it."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _noting(linear: Linear, module: Module, audit: Audit) -> Callable[..., None]:
    weight = type_in_words(next(module.parameters()).dtype)

    def note(_: Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = type_in_words(inputs[0].dtype)
        audit.note(linear, Product.fprop, x, weight)
        result = output[0] if isinstance(output, tuple) else output
        if result.requires_grad:
            result.register_hook(lambda grad: note_gradients(grad, x))

    def note_gradients(grad: Tensor, x: str) -> None:
        audit.note(linear, Product.dgrad, type_in_words(grad.dtype), weight)
        audit.note(linear, Product.wgrad, type_in_words(grad.dtype), x)

    return note
