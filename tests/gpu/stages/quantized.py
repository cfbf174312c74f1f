"""Quantized GEMMs of the card: against emulated ones, as the profiler sees them, FP8 weights."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.gemm_formats import Formats, Linear, formats_of
from hybrid_train.planning.gpu_formats import is_native
from hybrid_train.precision import te
from hybrid_train.precision.audit import Audit, Records
from hybrid_train.precision.emulated import emulation_of, quantized_linear
from hybrid_train.precision.quantize import quantize
from hybrid_train.precision.recipes import OPERANDS, schemes
from hybrid_train.runtime import optional
from hybrid_train.schema.model import Attention, Mamba, Mlp
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Backend, Gemm, GemmFormat, Precision, PrecisionRule
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import TrainJob
from tests.gpu.stages.machine import flavour, version_of
from tests.gpu.stages.notes import Notes, SkippedStage
from tests.gpu.stages.scans import apart, milliseconds
from tests.tiny import VOCAB, batch_of, losses_of, tiny_job

FORMATS = (
    GemmFormat.fp8_tensorwise,
    GemmFormat.fp8_delayed,
    GemmFormat.fp8_blockwise,
    GemmFormat.mxfp8,
    GemmFormat.nvfp4,
)
ON_CARD, PLAIN = (8192, 4096, 12288), (96, 64, 128)  # tokens, inputs, outputs
PASSES = 3  # of delayed scaling: the third has the largest values of the first two
BFLOAT16 = 2**-8  # how far a value may be from what it is rounded to, as a part of it
LENGTH, SEQUENCES, SEED = 128, 2, 7
STEPS = 3


def require_library(notes: Notes) -> None:
    """Skip where Transformer Engine is missing; its torch part is what computes.

    Raises:
        SkippedStage: if there is none.
    """
    if notes.plain:
        return
    if not optional.available("transformer_engine"):
        raise SkippedStage("Transformer Engine is not installed")
    importlib.import_module("transformer_engine.pytorch")  # the package hides that this fails
    notes.flavour(f"Transformer Engine {version_of('transformer-engine')}")


def usable(notes: Notes, format: GemmFormat) -> bool:
    """Tell whether the card has a format; a row says so where it has not."""
    if notes.plain or is_native(format, te.present_gpu()):
        return True
    gpu = te.present_gpu()
    capability = ".".join(map(str, gpu.capability))
    reason = f"{gpu.name} (compute capability {capability}) does not compute {format.value}"
    notes.skipped(format.value, reason)
    return False


# gemms -------------------------------------------------------------------------------------------


def gemms(notes: Notes) -> None:
    """Compare output and both gradients of a linear layer in every format that the card has.

    Operands are quantized to the same values, so what is left are sums in another order and two
    roundings of the result to bfloat16.
    """
    require_library(notes)
    if notes.plain:
        notes.flavour("emulated GEMMs against the reference quantizer")
    for format in FORMATS:
        if not usable(notes, format):
            continue
        precision = Precision(format=format, stochastic_rounding=False)
        operands = drawn(PLAIN if notes.plain else ON_CARD, "cpu" if notes.plain else "cuda")
        emulated = passed(emulated_linear(precision), operands)
        theirs = reference(precision, operands) if notes.plain else native(precision, operands)
        exact = passed(lambda x, weight: x @ weight.t(), operands)
        for what, one, other, plain in zip(
            ("output", "gradient of the input", "gradient of the weight"),
            theirs, emulated, exact, strict=True,
        ):  # fmt: skip
            notes.row(
                f"{format.value} {what}", apart(one, other), limit=2 * BFLOAT16,
                note=f"two roundings to bfloat16; the format changes {apart(other, plain):.3g}",
            )  # fmt: skip
        if not notes.plain:
            time_native(notes, precision, operands)


def drawn(sizes: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output, bfloat16."""
    tokens, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    x, weight, grad = (torch.randn(one, generator=generator).bfloat16() for one in shapes)
    return x.to(device), weight.to(device), grad.to(device)


def passed(
    multiply: Callable[[Tensor, Tensor], Tensor], operands: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Output, gradient of the input, gradient of the weight."""
    x, weight, grad = operands
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = multiply(x, weight)
    return (y, *torch.autograd.grad(y, (x, weight), grad))


def emulated_linear(precision: Precision) -> Callable[[Tensor, Tensor], Tensor]:
    """A linear layer whose operands are quantized, with sums in float32."""
    linear = Linear(0, 1, "mlp.linear_fc1")
    formats = Formats(dict.fromkeys(Gemm, precision.format), dict.fromkeys(Gemm))
    how = emulation_of(linear, formats, precision, Records())
    return lambda x, weight: quantized_linear(x, weight, how)


def reference(precision: Precision, operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The three GEMMs of the quantizer that is written to be read: the plain twin of hardware."""
    x, weight, grad = operands
    values = {"input": x, "weight": weight, "gradient": grad}
    results = []
    for gemm in (Gemm.fprop, Gemm.dgrad, Gemm.wgrad):
        found = schemes(precision.format, gemm, precision)
        assert found is not None
        sides = [
            quantize(values[operand.value], scheme, axis).dequantize()
            for (operand, axis), scheme in zip(OPERANDS[gemm], found, strict=True)
        ]
        # Each is laid so that the axis that is summed comes last.
        left, right = (
            side if axis else side.t()
            for side, (_, axis) in zip(sides, OPERANDS[gemm], strict=True)
        )
        results.append((left @ right.t()).bfloat16())
    return tuple(results)


class NativeLinear:
    """A linear layer of Transformer Engine with a given weight, in a given format."""

    def __init__(self, precision: Precision, weight: Tensor) -> None:
        """Build it."""
        library = importlib.import_module("transformer_engine.pytorch")
        outputs, inputs = weight.shape
        self.layer = library.Linear(
            inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda"
        )
        with torch.no_grad():
            self.layer.weight.copy_(weight)
        quantized = precision.format is not GemmFormat.bf16
        recipe = te.recipe(precision.format, precision) if quantized else None
        self._region = lambda: library.autocast(enabled=quantized, recipe=recipe)

    def passed(self, operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """As `passed`; the weight is the layer's own."""
        x, _, grad = operands
        x = x.detach().requires_grad_()
        self.layer.weight.grad = None
        with self._region():
            y = self.layer(x)
        y.backward(grad)
        assert x.grad is not None
        return y, x.grad, self.layer.weight.grad


def native(precision: Precision, operands: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The same by Transformer Engine."""
    layer = NativeLinear(precision, operands[1])
    for _ in range(PASSES if precision.format is GemmFormat.fp8_delayed else 1):
        found = layer.passed(operands)
    return found


def time_native(
    notes: Notes, precision: Precision, operands: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Note the time of the three GEMMs, and how many times faster they are than in bfloat16."""
    times = {}
    for format in (precision.format, GemmFormat.bf16):
        layer = NativeLinear(Precision(format=format, stochastic_rounding=False), operands[1])
        x = operands[0].detach().requires_grad_()

        def forward(layer: NativeLinear = layer, x: Tensor = x) -> Tensor:
            with layer._region():
                return layer.layer(x)

        times[format] = milliseconds(forward, [x, layer.layer.weight])
    own, plain = times[precision.format], times[GemmFormat.bf16]
    name = precision.format.value
    notes.row(f"{name} three GEMMs", own, "ms", note="quantization included")
    notes.row(f"{name} against bfloat16", plain / own, "times as fast", headline=True)


# models ------------------------------------------------------------------------------------------


@contextmanager
def groups_of(notes: Notes) -> Iterator[Any]:
    """Make this process a run of one; yields its groups."""
    from hybrid_train.runtime.start import process

    device = Device.cpu if notes.plain else Device.cuda
    with process(Runtime(device=device), seed=1234):
        from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

        groups = build_groups(Parallel(), timeout_s=60)
        try:
            yield groups
        finally:
            destroy_groups()


def job_of(notes: Notes, precision: Precision) -> TrainJob:
    """A small dense model whose sizes are multiples of 128, as blocks ask for."""
    job = tiny_job("M*-M-", precision=precision)
    job.runtime = Runtime(device=Device.cpu if notes.plain else Device.cuda, kernels=Kernels.auto)
    job.train.sequence_length, job.train.microbatch = LENGTH, SEQUENCES
    job.train.global_batch = SEQUENCES
    job.model.hidden_size = 128
    job.model.attention = Attention(heads=4, kv_heads=2, head_dim=32)
    job.model.mamba = Mamba(heads=32, head_dim=16, state_size=16, groups=2, chunk_size=64)
    job.model.mlp = Mlp(intermediate_size=256)
    job.optimizer.clip_grad_norm = 1e9  # norms are summed in another order where weights are FP8
    return job


def audit(notes: Notes) -> None:
    """Compare the formats that the audit noted with the kernels that the profiler saw."""
    require_library(notes)
    with groups_of(notes) as groups:
        for format in (GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise):
            if usable(notes, format):
                rules = [PrecisionRule(format=GemmFormat.bf16, modules=["attention"])]
                audit_format(notes, Precision(format=format, exceptions=rules), groups)


def audit_format(notes: Notes, precision: Precision, groups: Any) -> None:
    """Run one pass under both, and note what each says."""
    from torch.profiler import ProfilerActivity, profile

    from hybrid_train.model.build import build_model
    from hybrid_train.model.quantized import QuantizedGemms, observe_gemms
    from hybrid_train.training.hooks.rounding import audit_rows

    job = job_of(notes, precision)
    built = build_model(job, groups, VOCAB, on_gpu=not notes.plain)
    notes.flavour(flavour(built.kernels))
    listener = Audit()
    if built.backend is Backend.emulated:
        gemms = QuantizedGemms(job.model, job.precision, SEED, groups.tp_dp_cp)
        gemms.apply(built.chunks)
        gemms.start_step(0)
        listener = gemms.records.audit
    batch = batch_of(rows()).to("cpu" if notes.plain else "cuda")
    losses_of(built.chunks[0], batch)[0].backward()  # compiles and tunes
    stop = observe_gemms(built.chunks, listener)
    listener.start()
    activity = ProfilerActivity.CPU if notes.plain else ProfilerActivity.CUDA
    with profile(activities=[activity]) as record:
        losses_of(built.chunks[0], batch)[0].backward()
        if not notes.plain:
            torch.cuda.synchronize()
    stop()
    found = list(audit_rows(formats_of(job.model, precision), precision, listener.stop()))
    compare_audit(notes, precision.format.value, found, kernels_of(record, notes.plain))


def compare_audit(
    notes: Notes, format: str, found: list[dict[str, Any]], kernels: dict[str, int]
) -> None:
    """Note GEMMs by the audit, kernels by the profiler, and what they differ in."""
    wrong = [row for row in found if not row["as_asked"]]
    asked = sum(row["asked"] != GemmFormat.bf16.value for row in found)
    notes.row(f"{format}: GEMMs not as asked", len(wrong), limit=0, note="by the audit")
    notes.row(f"{format}: quantized GEMMs", asked, note="by the audit", headline=True)
    multiplied = {name: number for name, number in kernels.items() if is_gemm(name)}
    for name, number in sorted(multiplied.items()):
        notes.row(f"{format}: {name[:80]}", number, "calls", note="by the profiler")
    if notes.plain:
        seen = sum(multiplied.values())
        notes.row(f"{format}: audited GEMMs over all", asked / max(seen, 1), limit=1.0)
        return
    seen = sum(number for name, number in multiplied.items() if is_fp8(name))
    notes.row(
        f"{format}: kernels of FP8 more or fewer", abs(seen - asked), limit=0,
        note="names of kernels are cuBLAS's own: read them above where this is not zero",
    )  # fmt: skip


def kernels_of(record: Any, plain: bool) -> dict[str, int]:
    """How often each kernel ran on the card; on a CPU each function."""
    cpu = torch.autograd.DeviceType.CPU
    return {
        event.key: event.count
        for event in record.key_averages()
        if plain or event.device_type != cpu
    }


def is_gemm(name: str) -> bool:
    """Tell kernels of GEMMs by the words that cuBLAS, CUTLASS and torch name them with."""
    on_cpu = ("aten::mm", "aten::addmm", "aten::bmm", "_linear_pointwise")
    return any(word in name for word in ("gemm", "nvjet", "cutlass", *on_cpu))


def is_fp8(name: str) -> bool:
    """Tell kernels with FP8 operands: by their elements, in nvjet's by the letter q."""
    return any(word in name for word in ("e4m3", "e5m2", "nvjet_qq", "nvjet_qr", "nvjet_rq"))


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)


# weights in FP8 ----------------------------------------------------------------------------------


def fp8_gather(notes: Notes) -> None:
    """Compare steps and bytes of a run whose weights are kept in FP8 with those of bfloat16."""
    require_library(notes)
    with groups_of(notes) as groups:
        for format in (GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise):
            if not usable(notes, format):
                continue
            plain, bytes_plain, _ = trained(notes, Precision(format=format), groups)
            kept = Precision(format=format, fp8_param_gather=True)
            losses, bytes_kept, number = trained(notes, kept, groups)
            name = format.value
            off = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
            notes.row(
                f"{name} losses of {STEPS} steps apart", off, limit=BFLOAT16, headline=True,
                note="masters go through bfloat16 first, so but for the order of sums they agree",
            )  # fmt: skip
            notes.row(f"{name} parameters in FP8", number, "tensors")
            notes.row(f"{name} no parameter in FP8", int(number == 0), limit=0)
            notes.row(f"{name} bytes of weights", bytes_kept / bytes_plain, "of bfloat16's")


def trained(notes: Notes, precision: Precision, groups: Any) -> tuple[list[float], int, int]:
    """Losses of some steps, bytes of the weights, how many tensors of them are in FP8."""
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.checkpoints import is_in_fp8
    from hybrid_train.model.build import build_model

    job = job_of(notes, precision)
    built = build_model(job, groups, VOCAB, on_gpu=not notes.plain)
    notes.flavour(flavour(built.kernels))
    device = torch.device("cpu" if notes.plain else "cuda")
    engine = build_engine(job, built, groups, device)
    weights = [weight for chunk in engine.network.chunks for weight in chunk.parameters()]
    in_fp8 = [weight for weight in weights if is_in_fp8(weight)]
    size = sum(w.numel() * (1 if is_in_fp8(w) else w.element_size()) for w in weights)
    batches = itertools.repeat(batch_of(rows()).to(device))
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(STEPS)]
    return losses, size, len(in_fp8)
