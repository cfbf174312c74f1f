"""FP8 primary weights on a CPU: stands for Transformer Engine's Float8Tensor and its kin.

With FP8 parameter gather a process holds the codes and scales that GEMMs take, and nothing else
of a weight; masters are the optimizer's. Megatron's buffers, its gather and its optimizer see a
bfloat16 parameter whose bytes are codes. Transformer Engine brings masters to bfloat16 before it
quantizes them (2.20, pytorch/tensor/utils.py, `quantize_master_weights`), so that GEMMs are
those of a run that keeps its weights in bfloat16; so does this.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from hybrid_train.precision.formats import round_to_
from hybrid_train.precision.quantize import block_of, factors, in_blocks
from hybrid_train.precision.recipes import (
    Element,
    Scheme,
    Shape,
)

_CODES = torch.float8_e4m3fn  # as torch calls what is kept as uint8
_CHUNK = 262144  # values that are worked on at once, as in `operands.py`
_aten = torch.ops.aten


class Float8Weight(Tensor):
    """A matrix [O, I] kept as E4M3 codes and scales; to all others a bfloat16 tensor.

    It changes by `copy_` and `quantize_shards` alone, and is read as what its codes stand for.

    Attributes:
        scheme: how it is quantized, one scale a tensor or a square block.
        codes: uint8 [O, I]; Megatron puts its own memory in their place.
        encode: float32, what values of a block are multiplied with before they are rounded.
        decode: float32, the factor back.
    """

    scheme: Scheme
    codes: Tensor
    encode: Tensor
    decode: Tensor
    _first: Tensor | None = None

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, dtype: torch.dtype, scheme: Scheme) -> "Float8Weight":
        """Wrap codes; see `in_fp8` for values."""
        made: Float8Weight = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device
        )
        made.scheme, made.codes = scheme, codes
        made.encode, made.decode = torch.ones(2, *made._grid(), device=codes.device)
        return made

    def dequantize(self) -> Tensor:
        """Return what the codes stand for, float32 [O, I], as GEMMs take it."""
        of_code = _values_of_codes(self.device)
        if self.scheme.shape is Shape.tensor:
            return _looked_up(of_code * self.decode.view(()), self.codes)
        values = _looked_up(of_code, self.codes)
        return _matrix(in_blocks(values, self._block()).mul_(self.decode), self.shape)

    from_float8 = dequantize  # as core calls it where it finds no version of Transformer Engine

    def get_high_precision_init_val(self) -> Tensor:
        """Return the bfloat16 values that masters begin with (core, distrib_optimizer.py 431)."""
        assert self._first is not None, "asked once, when the optimizer is built"
        return self._first

    def clear_high_precision_init_val(self) -> None:
        """Forget them."""
        self._first = None

    def quantize(self, values: Tensor) -> None:
        """Take these bfloat16 values [O, I], known as a whole."""
        self.set_scales(self.largest(values.reshape(-1), 0))
        self.write(values.reshape(-1), 0)

    def largest(self, part: Tensor, start: int) -> Tensor:
        """Return the largest magnitude of each block, float32, of a range of the flat weight.

        What lies outside of the range counts as zero.
        """
        if self.scheme.shape is Shape.tensor:
            found = part.abs().amax() if part.numel() else part.new_zeros(())
            return found.to(torch.float32).view(1, 1, 1, 1)
        found = torch.zeros_like(self.encode)
        for chunk, begin in self._chunks(part, start):
            blocks, first, _ = self._covered(chunk, begin)
            found[first : first + len(blocks)] = blocks.abs().amax((1, 3), keepdim=True)
        return found

    def set_scales(self, amax: Tensor) -> None:
        """Take the scales that go with the largest magnitudes of the blocks."""
        found = factors(amax, self.scheme, self.dtype)
        self.encode.copy_(found.encode)
        self.decode.copy_(found.decode)

    def write(self, part: Tensor, start: int) -> None:
        """Quantize a range of the flat weight by the scales, and take its codes."""
        kept = self.codes.view(-1)
        for chunk, begin in self._chunks(part, start):
            if self.scheme.shape is Shape.tensor:
                codes = _codes(chunk.to(torch.float32) * self.encode.view(()))
            else:
                blocks, first, skipped = self._covered(chunk, begin)
                scaled = blocks * self.encode[first : first + len(blocks)]
                rows = _codes(scaled).flatten(2).flatten(0, 1)[:, : self.shape[1]]
                codes = rows.reshape(-1)[skipped : skipped + chunk.numel()]
            kept[begin : begin + chunk.numel()] = codes

    def _chunks(self, part: Tensor, start: int) -> Iterator[tuple[Tensor, int]]:
        """Cut a flat range between rows of blocks into chunks that stay in a core's cache."""
        unit = 1 if self.scheme.shape is Shape.tensor else self._block()[0] * self.shape[1]
        most = part.numel() if part.is_cuda else _CHUNK
        size = max(1, most // unit) * unit
        begin, stop = start, start + part.numel()
        while begin < stop:
            end = min(stop, (begin // size + 1) * size)
            yield part[begin - start : end - start], begin
            begin = end

    def _covered(self, part: Tensor, start: int) -> tuple[Tensor, int, int]:
        """Cut the rows of blocks that a flat range touches into blocks, with zeros around it.

        Returns:
            The blocks in float32, the number of the first row of them, and the elements in front of
            the range.
        """
        (tall, _), width = self._block(), self.shape[1]
        first, last = start // width // tall, -(-(start + part.numel()) // (width * tall))
        skipped = start - first * tall * width
        rows = torch.zeros((last - first) * tall, width, device=part.device)
        rows.view(-1)[skipped : skipped + part.numel()] = part
        return in_blocks(rows, self._block()), first, skipped

    def _block(self) -> tuple[int, int]:
        return block_of(self, self.scheme, 1)

    def _grid(self) -> tuple[int, int, int, int]:
        """Return the number of blocks by rows and by columns, each with a block of one value."""
        (tall, wide), (rows, columns) = self._block(), self.shape
        return -(-rows // tall), 1, -(-columns // wide), 1

    def _twin(self) -> "Float8Weight":
        """Return another with the same memory."""
        twin = Float8Weight(self.codes, self.dtype, self.scheme)
        twin.encode, twin.decode, twin._first = self.encode, self.decode, self._first
        return twin

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is no class method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Share codes with a detached twin, quantize what is copied in, and else be read."""
        if func is _aten.detach.default:
            return args[0]._twin()
        if func is _aten.copy_.default and isinstance(args[0], Float8Weight):
            args[0].quantize(_plain(args[1]).to(args[0].dtype))
            return args[0]
        if func._schema.is_mutable and isinstance(args[0], Float8Weight):
            raise TypeError(f"a weight in FP8 changes by copy_ alone, not by {func}")
        args, kwargs = pytree.tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def in_fp8(weight: Tensor, scheme: Scheme) -> Float8Weight:
    """Quantize a bfloat16 weight [O, I], whose values are remembered until masters have them."""
    assert scheme.element is Element.e4m3, scheme
    assert scheme.shape is not Shape.vector, "each GEMM has vectors of its own"
    values = weight.detach()
    made = Float8Weight(torch.empty_like(values, dtype=torch.uint8), values.dtype, scheme)
    made.quantize(values)
    made._first = values
    return made


def replace_codes(weight: Float8Weight, memory: Tensor) -> None:
    """Let a weight keep its codes in other memory; under the signature of core (fp8_utils.py)."""
    memory.copy_(weight.codes)
    weight.codes = memory


def quantize_shards(
    weights: Sequence[Float8Weight],
    masters: Sequence[Tensor | None],
    starts: Sequence[int | None],
    group: dist.ProcessGroup,
    _: None = None,
) -> None:
    """Give weights what their masters became; under the signature of core (fp8_utils.py).

    Scales are those of the whole weights; codes are written where this rank has the master.

    Args:
        weights: all weights of the group, the same on every rank.
        masters: the part of each that this rank has, flat float32; None: no part.
        starts: first element of the part.
        group: ranks that share the masters.
    """
    if not weights:
        return
    none = weights[0].codes.new_empty(0, dtype=weights[0].dtype)
    parts = [
        (weight, none if master is None else master.to(weight.dtype), start or 0)
        for weight, master, start in zip(weights, masters, starts, strict=True)
    ]
    for weight in weights:  # also where this rank has no part of the master, and nobody asked
        weight.clear_high_precision_init_val()
    found = [weight.largest(part, start) for weight, part, start in parts]
    amaxes = torch.cat([amax.view(-1) for amax in found])
    dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
    sizes = [amax.numel() for amax in found]
    for (weight, part, start), own, amax in zip(parts, found, amaxes.split(sizes), strict=True):
        weight.set_scales(amax.view(own.shape))
        weight.write(part, start)


@cache
def _values_of_codes(device: torch.device) -> Tensor:
    """Return the value of each of the 256 codes, float32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(_CODES).to(torch.float32)


def _looked_up(of_code: Tensor, codes: Tensor) -> Tensor:
    """Return the value of each code; several times as fast on a CPU as torch's own conversion."""
    return of_code.index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)


def _codes(scaled: Tensor) -> Tensor:
    """Round scaled float32 values to E4M3; -> uint8."""
    rounded = round_to_(scaled, Element.e4m3, torch.empty_like(scaled))
    return rounded.to(_CODES).view(torch.uint8)


def _matrix(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def _plain(value: Any) -> Any:
    """Read a weight in the type that it claims to have."""
    return value.dequantize().to(value.dtype) if isinstance(value, Float8Weight) else value
