"""What linear layers multiply: the edit that quantizes GEMMs, and notes of what the rest does."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from hybrid_train.anatomy.gemm_formats import Linear, formats_of, fp8_primary_weights
from hybrid_train.megatron import patches, plain
from hybrid_train.megatron.plain import linear_modules
from hybrid_train.model.edits import edits_of, emulations_of, linears_of, quantize
from hybrid_train.precision.audit import (
    Audit,
    Records,
    is_te_linear,
    observe_te_linears,
    type_in_words,
)
from hybrid_train.precision.emulated import Stage, emulation_of
from hybrid_train.precision.fp8_weights import in_fp8
from hybrid_train.precision.recipes import Scheme, schemes
from hybrid_train.schema.model import Model
from hybrid_train.schema.precision import Gemm, Precision
from hybrid_train.schema.problems import UserError

if TYPE_CHECKING:
    from hybrid_train.precision.quantize import AmaxHistory


class QuantizedGemms:
    """Emulates the quantized GEMMs of the chunks of this process, which `apply` takes.

    Every process makes the same calls. The random bits of a step depend on seed, step and rank
    alone, so a resumed run has those of a run that never stopped.
    """

    stage = Stage.quantize

    def __init__(
        self, model: Model, precision: Precision, seed: int, group: dist.ProcessGroup
    ) -> None:
        """Take the settings.

        Args:
            model: what the chunks are made of.
            precision: the formats to begin with.
            seed: of the run.
            group: ranks that agree on the largest values of a step (fp8_delayed): those of the
                same pipeline stage.
        """
        self._model, self._precision = model, precision
        self._chunks: Sequence[Module] = ()
        self._seed = seed
        self._group = group
        self.records = Records()
        self.histories: list[AmaxHistory] = []  # in the same order on all ranks of the group

    def apply(self, chunks: Sequence[Module]) -> None:
        """Quantize the GEMMs of chunks, and keep their weights in FP8 where that is asked."""
        self._chunks = chunks
        self.use(self._model, self._precision)
        self._keep_weights_in_fp8()

    def use(self, model: Model, precision: Precision) -> None:
        """Let every linear layer multiply in its format; what another phase asked is undone."""
        formats = formats_of(model, precision)
        for linear, module in linears_of(self._chunks):
            chosen = formats[linear]
            make = partial(emulation_of, linear, chosen, precision, self.records)
            if not chosen.quantized:
                quantize(module, ())
            elif isinstance(module, plain.GroupedLinear):
                quantize(module, [make(rows_vary=True) for _ in range(module.num_experts)])
            else:
                quantize(module, [make()])
        self.histories = [
            history
            for _, module in linears_of(self._chunks)
            for how in emulations_of(module)
            for history in how.histories.values()
        ]

    def _keep_weights_in_fp8(self) -> None:
        """Let the layers that are to keep their weights in FP8 do so; before buffers are made.

        Raises:
            UserError: if another edit has transformed the operands of one.
        """
        precision = self._precision
        kept = fp8_primary_weights(self._model, precision)
        if not kept:
            return
        patches.for_fp8_weights()
        for linear, module in linears_of(self._chunks):
            if linear not in kept:
                continue
            edited = edits_of(module)
            if edited is not None and edited.transforms:
                raise UserError(
                    f"{linear.module} of layer {linear.layer} keeps its weights in FP8, as codes "
                    "that no mask or other edit can change: set precision.fp8_param_gather=false"
                )
            found = schemes(kept[linear], Gemm.fprop, precision)
            assert found is not None, "only quantized formats are kept"
            for name, weight in module.named_parameters():
                if name.startswith("weight"):  # of a norm in front of the GEMM there may be one
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


def _as_fp8(weight: Parameter, scheme: Scheme) -> Parameter:
    kept = Parameter(in_fp8(weight, scheme))
    vars(kept).update(vars(weight))  # by which Megatron knows how it is split
    return kept


def observe_gemms(chunks: Iterable[Module], audit: Audit) -> Callable[[], None]:
    """Tell an audit of every GEMM of layers that do not tell it themselves.

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
            if is_te_linear(module):
                native.append((linear, module))
            elif not emulations_of(module):
                home = homes.get(module, module)
                handles.append(home.register_forward_hook(_noting(linear, module, audit)))

    stop_native = observe_te_linears(native, audit) if native else None

    def stop() -> None:
        for handle in handles:
            handle.remove()
        if stop_native is not None:
            stop_native()

    return stop


def _noting(linear: Linear, module: Module, audit: Audit) -> Callable[..., None]:
    weight = type_in_words(next(module.parameters()).dtype)

    def note(_: Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = type_in_words(inputs[0].dtype)
        audit.note(linear, Gemm.fprop, x, weight)
        result = output[0] if isinstance(output, tuple) else output
        if result.requires_grad:
            result.register_hook(lambda grad: note_gradients(grad, x))

    def note_gradients(grad: Tensor, x: str) -> None:
        audit.note(linear, Gemm.dgrad, type_in_words(grad.dtype), weight)
        audit.note(linear, Gemm.wgrad, type_in_words(grad.dtype), x)

    return note


def unwrapped(chunk: Module) -> Module:
    """Return the model itself, without what data parallelism and half precision put around it."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
