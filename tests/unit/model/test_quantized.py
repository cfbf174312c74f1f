"""Every linear layer of a model multiplies in the format that the plan has for it."""

import math
from typing import Any

import pytest

from hybrid_train.anatomy.gemm_formats import formats_of, linears
from hybrid_train.precision.audit import Audit, Seen
from hybrid_train.precision.recipes import operands_as_asked
from hybrid_train.schema.parallel import Parallel, Recompute
from hybrid_train.schema.precision import Gemm, GemmFormat, NumberFormat, Precision, PrecisionRule
from hybrid_train.schema.train import TrainJob
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, as_family, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
MIXED = [
    PrecisionRule(layers="last 1", format=GemmFormat.bf16),
    PrecisionRule(modules=["mamba.out_proj"], format=GemmFormat.mxfp8),
    PrecisionRule(modules=["moe.latent"], format=GemmFormat.bf16, gemms=[Gemm.wgrad]),
]


def job_of(precision: Precision) -> TrainJob:
    return tiny_job(precision=precision)


def step(engine: Any) -> float:
    loss: float = engine.step(microbatches(some_rows(), 2), tokens_seen=0).loss
    return loss


def heard(engine: Any) -> Seen:
    from hybrid_train.model.quantized import observe_gemms

    audit: Audit = engine.network.quantized.records.audit
    audit.start()
    stop = observe_gemms(engine.network.chunks, audit)
    step(engine)
    stop()
    return audit.stop()


def asked(job: TrainJob) -> Seen:
    return {
        (linear, gemm): {operands_as_asked(format, gemm, job.precision)}
        for linear, chosen in formats_of(job.model, job.precision).items()
        for gemm, format in chosen.formats.items()
    }


@pytest.mark.parametrize(
    "precision",
    [
        Precision(format=GemmFormat.bf16),
        Precision(format=GemmFormat.fp32),
        Precision(format=GemmFormat.nvfp4, exceptions=MIXED),
        Precision(format=GemmFormat.fp8_delayed),
        Precision(format=GemmFormat.mxfp8, unquantized=NumberFormat.fp32),
    ],
    ids=lambda precision: precision.format.value,
)
def test_all_products_of_all_layers_are_heard_in_the_format_asked_for(
    groups: Any, precision: Precision
) -> None:
    job = job_of(precision)
    engine = tiny_engine(job, groups)
    seen = heard(engine)
    assert {linear for linear, _ in seen} == set(linears(job.model))
    assert seen == asked(job)


def test_another_phase_takes_the_quantization_back(groups: Any) -> None:
    job = job_of(Precision(format=GemmFormat.nvfp4))
    healed = job_of(
        Precision(format=GemmFormat.nvfp4, exceptions=[PrecisionRule(format=GemmFormat.bf16)])
    )
    engine = tiny_engine(job, groups)
    step(engine)
    engine.network.quantized.use(healed.model, healed.precision)
    assert heard(engine) == asked(healed)
    never = tiny_engine(job_of(Precision(format=GemmFormat.bf16)), groups)
    never.network.chunks[0].module.load_state_dict(engine.network.chunks[0].module.state_dict())
    batch = next(microbatches(some_rows(), 2))
    assert never.evaluate([batch]) == engine.evaluate([batch])


@pytest.mark.parametrize(
    "format",
    sampled([GemmFormat.nvfp4, GemmFormat.fp8_delayed], GemmFormat.nvfp4),
)
def test_steps_are_repeated_to_the_bit(groups: Any, format: GemmFormat) -> None:
    losses = []
    for _ in range(2):
        engine = tiny_engine(job_of(Precision(format=format)), groups)
        losses.append([step(engine) for _ in range(3)])
    assert losses[0] == losses[1]


def test_activations_that_are_computed_again_are_quantized_alike(groups: Any) -> None:
    kept, again = (
        tiny_engine(
            tiny_job(precision=Precision(format=GemmFormat.nvfp4), parallel=parallel), groups
        )
        for parallel in (Parallel(), Parallel(recompute=Recompute.full))
    )
    assert [step(kept) for _ in range(2)] == [step(again) for _ in range(2)]


@pytest.mark.slow
def test_a_validation_does_not_change_the_scales_of_later_steps(groups: Any) -> None:
    losses = []
    for validates in (False, True):
        engine = tiny_engine(job_of(Precision(format=GemmFormat.fp8_delayed)), groups)
        found = []
        for _ in range(3):
            if validates:
                engine.evaluate([next(microbatches(some_rows(seed=9), 2))])
            found.append(step(engine))
        losses.append(found)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_model_learns_in_four_bits(groups: Any) -> None:
    job = job_of(Precision(format=GemmFormat.nvfp4))
    job.schedule.peak_lr = 1e-2
    engine = tiny_engine(job, groups)
    losses = [step(engine) for _ in range(12)]
    assert losses[-1] < 0.75 * losses[0]


def test_a_second_network_in_the_process_changes_nothing_of_the_first(groups: Any) -> None:
    """Neither its losses, whose rounding draws random bits, nor what is noted of it."""
    from hybrid_train.model.quantized import observe_gemms

    four_bits = job_of(Precision(format=GemmFormat.nvfp4))
    alone = tiny_engine(four_bits, groups)
    losses = [step(alone) for _ in range(2)]
    first = tiny_engine(four_bits, groups)
    mixed = job_of(Precision(format=GemmFormat.nvfp4, exceptions=MIXED))
    second = tiny_engine(mixed, groups)
    audits, statistics = (
        [getattr(one.network.quantized.records, name) for one in (first, second)]
        for name in ("audit", "statistics")
    )
    stops = [
        observe_gemms(one.network.chunks, audit)
        for one, audit in zip((first, second), audits, strict=True)
    ]
    for record in (*audits, statistics[0]):
        record.start()
    start, steps = first.network.quantized.start_step, []

    def start_both(number: int) -> None:
        start(number)
        steps.append(step(second))  # in the middle of a step of the first

    first.network.quantized.start_step = start_both
    all_or_none = [step(first) for _ in range(2)]
    for stop in stops:
        stop()
    assert all_or_none == losses
    assert len(steps) == 2
    assert audits[0].stop() == asked(four_bits)
    assert audits[1].stop() == asked(mixed)
    assert statistics[0].stop()
    assert statistics[1].stop() == {}


@pytest.mark.parametrize("format", [GemmFormat.fp8_blockwise, GemmFormat.nvfp4])
@pytest.mark.parametrize("family", ["llama", "qwen", "nemotron"])
def test_a_transformer_learns_in_few_bits_as_asked(
    family: str, format: GemmFormat, groups: Any
) -> None:
    job = tiny_job("*-*-", precision=Precision(format=format))
    job.schedule.peak_lr = 1e-2
    as_family(job.model, family)
    engine = tiny_engine(job, groups)
    losses = [step(engine) for _ in range(20)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.5
    assert heard(engine) == asked(job)
