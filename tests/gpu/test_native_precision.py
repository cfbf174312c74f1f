"""Transformer Engine's quantized GEMMs against the emulated ones, and what the audit says.

Written for a GPU and not yet run on one: the machine of the trunk has none. Formats that the GPU
lacks are skipped by name.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.gemm_formats import formats_of
from hybrid_train.planning.gpu_formats import is_native
from hybrid_train.precision.audit import Audit
from hybrid_train.precision.te import present_gpu
from hybrid_train.schema.model import Attention, Mamba, Mlp, Moe
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import (
    Backend,
    GemmFormat,
    NumberFormat,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from hybrid_train.schema.train import TrainJob
from tests.tiny import MEGATRON_WARNINGS, VOCAB, batch_of, losses_of, tiny_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *MEGATRON_WARNINGS,
]
LENGTH, SEQUENCES, SEED = 128, 2, 7
FORMATS = [
    GemmFormat.fp8_tensorwise,
    GemmFormat.fp8_delayed,
    GemmFormat.fp8_blockwise,
    GemmFormat.mxfp8,
    GemmFormat.nvfp4,
]
# Sums in another order and bfloat16 in between change the last bits of what is quantized next, and
# a few values go to the other neighbour. That must stay well below what the format itself changes.
SHARE_OF_THE_FORMAT = 0.5


@pytest.fixture(scope="module")
def gpu_groups() -> Iterator[Any]:
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.runtime.start import process

    with process(Runtime(device=Device.cuda), seed=1234):
        groups = build_groups(Parallel(), timeout_s=60)
        # A pass outside the schedule would set one of another shape, which the schedule refuses.
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1, device="cuda")
        yield groups
        destroy_groups()


def job_of(precision: Precision, backend: Backend, pattern: str = "MEM*M-") -> TrainJob:
    """A job whose sizes are multiples of 32 wherever a format may ask for it."""
    job = tiny_job(pattern, precision=copy.deepcopy(precision))
    job.precision.backend = backend
    job.runtime = Runtime(device=Device.cuda, kernels=Kernels.auto)
    job.train.sequence_length, job.train.microbatch = LENGTH, SEQUENCES
    job.model.hidden_size = 128
    job.model.attention = Attention(heads=4, kv_heads=2, head_dim=32)
    job.model.mamba = Mamba(heads=32, head_dim=16, state_size=16, groups=2, chunk_size=64)
    job.model.mlp = Mlp(intermediate_size=256)
    job.model.moe = Moe(
        experts=4, top_k=2, intermediate_size=128, shared_intermediate_size=128, latent_size=64
    )
    return job


def quantized(format: GemmFormat, **options: Any) -> Precision:
    if not is_native(format, present_gpu()):
        pytest.skip(f"{present_gpu().name} does not compute {format.value}")
    return Precision(format=format, **options)


def model_of(job: TrainJob, groups: Any) -> Any:
    """A model with the weights of the seed, its GEMMs as the job asks."""
    from hybrid_train.model.build import build_model
    from hybrid_train.model.quantized import QuantizedGemms

    built = build_model(job, groups, VOCAB, on_gpu=True)
    formats = formats_of(job.model, job.precision).values()
    if any(one.quantized for one in formats):
        assert built.backend is job.precision.backend
    if built.backend is Backend.emulated:
        gemms = QuantizedGemms(job.model, job.precision, SEED, groups.tp_dp_cp)
        gemms.apply(built.chunks)
        gemms.start_step(0)
    return built.chunks[0]


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of fixed rows, and the gradients of all weights."""
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    batch = batch_of(rows).to("cuda")
    total, losses = losses_of(model, batch)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def apart(one: Tensor, other: Tensor) -> float:
    """The length of a difference as a part of the length of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("format", FORMATS)
def test_native_products_are_the_emulated_ones(gpu_groups: Any, format: GemmFormat) -> None:
    """Without chance, which the two draw from different generators.

    Delayed scaling begins alike in neither: the hardware with a scale of 1, ours with the present
    largest values. Only its audit is compared.
    """
    if format is GemmFormat.fp8_delayed:
        pytest.skip("the first scales of fp8_delayed are others; its audit is compared below")
    precision = quantized(format, stochastic_rounding=False)
    bf16 = Precision(format=GemmFormat.bf16)
    native = run(model_of(job_of(precision, Backend.native), gpu_groups))
    emulated = run(model_of(job_of(precision, Backend.emulated), gpu_groups))
    exact = run(model_of(job_of(bf16, Backend.auto), gpu_groups))
    limit = SHARE_OF_THE_FORMAT * apart(emulated[0], exact[0])
    assert apart(native[0], emulated[0]) < limit
    assert native[1].keys() == emulated[1].keys() == exact[1].keys()
    stacked = [
        torch.cat([gradients[name].flatten() for name in sorted(gradients)])
        for gradients in (native[1], emulated[1], exact[1])
    ]
    limit = SHARE_OF_THE_FORMAT * apart(stacked[1], stacked[2])
    assert apart(stacked[0], stacked[1]) < limit


def audited(job: TrainJob, groups: Any) -> list[dict[str, Any]]:
    """The rows of the audit of one forward and backward pass."""
    from hybrid_train.model.quantized import observe_gemms
    from hybrid_train.training.hooks.rounding import audit_rows

    model = model_of(job, groups)
    audit = Audit()
    stop = observe_gemms([model], audit)
    audit.start()
    run(model)
    stop()
    return list(audit_rows(formats_of(job.model, job.precision), job.precision, audit.stop()))


def surprises(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['layer_name']} {row['gemm']}: {row['asked']}, not {row['operands']}"
        for row in rows
        if not row["as_asked"]
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_every_product_runs_as_asked(gpu_groups: Any, format: GemmFormat) -> None:
    rules = [
        PrecisionRule(format=GemmFormat.bf16, layers="last 1"),
        PrecisionRule(format=GemmFormat.bf16, modules=["attention"]),
    ]
    precision = quantized(format, exceptions=rules)
    rows = audited(job_of(precision, Backend.native), gpu_groups)
    assert rows
    assert surprises(rows) == []


def test_the_published_recipe_of_super_runs_as_asked(gpu_groups: Any) -> None:
    """Three formats in one model, and an MTP block that is not quantized."""
    rules = [
        PrecisionRule(format=GemmFormat.bf16, layers="last 15%"),
        PrecisionRule(format=GemmFormat.bf16, modules=["attention", "moe.latent", "mtp"]),
        PrecisionRule(format=GemmFormat.mxfp8, modules=["mamba.out_proj"]),
    ]
    quantized(GemmFormat.mxfp8)
    precision = quantized(GemmFormat.nvfp4, exceptions=rules)
    job = job_of(precision, Backend.native, "MEMEM*ME/*E/*E")
    assert surprises(audited(job, gpu_groups)) == []


@pytest.mark.parametrize("format", [GemmFormat.mxfp8, GemmFormat.fp8_tensorwise])
def test_an_mtp_block_is_quantized_where_asked(gpu_groups: Any, format: GemmFormat) -> None:
    job = job_of(quantized(format), Backend.native, "M*/*E/*E")
    assert surprises(audited(job, gpu_groups)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"hadamard": False},
        {"stochastic_rounding": False},
        {"square_weight_blocks": False},
    ],
    ids=str,
)
def test_the_switches_of_nvfp4_reach_the_products(
    gpu_groups: Any, options: dict[str, bool]
) -> None:
    job = job_of(quantized(GemmFormat.nvfp4, **options), Backend.native)
    assert surprises(audited(job, gpu_groups)) == []


@pytest.mark.parametrize("power", [False, True])
def test_the_scales_of_fp8_reach_the_products(gpu_groups: Any, power: bool) -> None:
    precision = quantized(GemmFormat.fp8_tensorwise, power_of_two_scales=power)
    assert surprises(audited(job_of(precision, Backend.native), gpu_groups)) == []


GATHERED = [GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise]


@pytest.mark.parametrize("format", GATHERED)
def test_weights_in_fp8_give_the_steps_of_bfloat16_weights(
    gpu_groups: Any, format: GemmFormat
) -> None:
    """As Transformer Engine means it: masters go through bfloat16 before they are quantized."""
    plain = steps(job_of(quantized(format), Backend.native), gpu_groups)
    precision = quantized(format, fp8_param_gather=True)
    assert steps(job_of(precision, Backend.native), gpu_groups) == plain


def steps(job: TrainJob, groups: Any) -> list[float]:
    """The losses of some steps; gradients are not clipped, since norms are summed otherwise."""
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.checkpoints import is_in_fp8
    from hybrid_train.model.build import build_model

    job.optimizer.clip_grad_norm = 1e9
    built = build_model(job, groups, VOCAB, on_gpu=True)
    engine = build_engine(job, built, groups, torch.device("cuda"))
    kept = sum(
        is_in_fp8(weight) for chunk in engine.network.chunks for weight in chunk.parameters()
    )
    assert bool(kept) is job.precision.fp8_param_gather
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    batches = itertools.repeat(batch_of(rows).to("cuda"))
    return [engine.step(batches, tokens_seen=0).loss for _ in range(3)]


def test_what_this_gpu_lacks_is_refused(gpu_groups: Any) -> None:
    lacking = [format for format in FORMATS if not is_native(format, present_gpu())]
    if not lacking:
        pytest.skip(f"{present_gpu().name} computes all of them")
    for format in lacking:
        precision = Precision(format=format, unquantized=NumberFormat.bf16)
        with pytest.raises(UserError, match=format.value):
            model_of(job_of(precision, Backend.auto), gpu_groups)
