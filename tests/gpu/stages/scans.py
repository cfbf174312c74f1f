"""The scan of mamba-ssm against ours: outputs, gradients, last state, and time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_train.ops.scan import chunked_scan, sequential_scan
from tests.gpu.stages.machine import version_of
from tests.gpu.stages.notes import Notes, SkippedStage

ROUNDS = 7
NAMES = ("x", "dt", "a", "b", "c", "d")
# The kernels round the operands of four GEMMs, one behind the other (c b', scores x, states, c
# states), to the type that they multiply in; in the gradients each such chain is met twice.
ROUNDINGS, GRADIENT_ROUNDINGS = 4, 8
UNITS = {torch.bfloat16: 2**-8, torch.float32: 2**-11}  # float32 is multiplied as TF32: 10 bits


@dataclass(frozen=True)
class Sizes:
    """Of a scan: batch, length, heads, head width, groups, state, chunk."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    state: int
    chunk: int


ON_CARD = Sizes(1, 4096, 112, 64, 8, 128, 128)  # a layer of Nemotron-H 4B
PLAIN = Sizes(2, 96, 4, 8, 2, 16, 32)


def scan(notes: Notes) -> None:
    """Compare both, in bfloat16 and in float32, at the sizes of a layer of Nemotron-H 4B."""
    if notes.plain:
        notes.flavour("chunked against sequential scan")
        # Each output is a sum over at most `length` tokens, rounded at 2^-24 each.
        limit = PLAIN.length * 2.0**-24
        compare(notes, PLAIN, torch.float32, sequential, limits=(limit, 2 * limit))
        return
    if version_of("mamba-ssm") == "none":
        raise SkippedStage("mamba-ssm is not installed")
    notes.flavour(f"mamba-ssm {version_of('mamba-ssm')} (Triton)")
    for dtype in (torch.bfloat16, torch.float32):
        limits = (ROUNDINGS * UNITS[dtype], GRADIENT_ROUNDINGS * UNITS[dtype])
        compare(notes, ON_CARD, dtype, kernel, limits=limits)


def kernel(sizes: Sizes, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """mamba-ssm's scan."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, a, b, c, d = operands
    found: tuple[Tensor, Tensor] = mamba_chunk_scan_combined(
        x, dt, a, b, c, sizes.chunk, D=d, return_final_states=True
    )
    return found


def ours(sizes: Sizes, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Our chunked scan, whose arithmetic is float32."""
    x, dt, a, b, c, d = operands
    return chunked_scan(x, dt, a, b, c, chunk=sizes.chunk, d=d)


def sequential(_: Sizes, operands: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The reference, token by token: the plain twin of a kernel."""
    x, dt, a, b, c, d = operands
    return sequential_scan(x, dt, a, b, c, d=d)


def compare(
    notes: Notes, sizes: Sizes, dtype: torch.dtype, theirs: Any, *, limits: tuple[float, float]
) -> None:
    """Note how far both are apart, and the time of each."""
    operands = drawn(sizes, dtype, "cpu" if notes.plain else "cuda")
    weight = torch.randn_like(operands[0])
    name = str(dtype).removeprefix("torch.")
    results = {}
    for form in (theirs, ours):
        y, state = form(sizes, operands)
        gradients = torch.autograd.grad((y.float() * weight.float()).sum(), operands)
        results[form] = (y, state, *gradients)
    reason = f"of the length of the whole; at most {limits[0]:.3g} a value"
    named = ("outputs", "last state", *(f"gradient of {name}" for name in NAMES))
    for number, what in enumerate(named):
        off = apart(results[theirs][number], results[ours][number])
        notes.row(f"{name} {what}", off, limit=limits[number > 1], note=reason)
    for form, what in ((theirs, "reference" if notes.plain else "mamba-ssm"), (ours, "ours")):
        spent = milliseconds(lambda form=form: form(sizes, operands)[0].float(), operands)
        notes.row(f"{name} forward and backward, {what}", spent, "ms", headline=True)


def drawn(sizes: Sizes, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Draw operands as a layer meets them; step sizes and decay rates stay float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, heads = (sizes.batch, sizes.length), sizes.heads
    found = [
        normal(*rows, heads, sizes.width).to(dtype),
        0.1 * normal(*rows, heads).sigmoid(),
        -16 * normal(heads).sigmoid(),
        normal(*rows, sizes.groups, sizes.state).to(dtype),
        normal(*rows, sizes.groups, sizes.state).to(dtype),
        normal(heads),
    ]
    return [one.to(device).requires_grad_() for one in found]


def apart(one: Tensor, other: Tensor) -> float:
    """The length of a difference as a part of the length of the second."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def milliseconds(forward: Callable[[], Tensor], operands: list[Tensor]) -> float:
    """The median time of a forward and backward pass; the device is waited for."""
    on_card = operands[0].is_cuda
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        y = forward()
        torch.autograd.grad(y, operands, torch.ones_like(y))
        if on_card:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
