"""What the hardware lacks is refused before anything starts, with the way to run it anyway."""

import copy

import pytest
import torch

from hybrid_train.config.checks import check
from hybrid_train.config.compose import compose
from hybrid_train.config.rules_of_precision import (
    MULTIPLES,
    NATIVE_RULES,
    hardware_notes,
    quantized_linears,
)
from hybrid_train.planning import degrees
from hybrid_train.planning.gemm_sizes import token_sizes
from hybrid_train.planning.phases import jobs_of
from hybrid_train.schema.parallel import Recompute, RecomputeModule
from hybrid_train.schema.precision import (
    Backend,
    Gemm,
    GemmFormat,
    NumberFormat,
    Precision,
    PrecisionRule,
)
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.train import TrainJob

SUPER = compose("check", ["experiment=nemotron3_super", "processes=1024"])
PROCESSES = 1024
# Sizes that every format takes on one process.
SMALL = compose(
    "train",
    [
        "experiment=tiny_cpu",
        "runtime.device=cuda",
        "model.pattern=MEM*M-",
        "model.mamba.heads=32",
        "model.moe.latent_size=32",
        "model.moe.intermediate_size=64",
        "model.moe.shared_intermediate_size=64",
        "precision=mxfp8",
    ],
)


def small(precision: Precision) -> TrainJob:
    job = copy.deepcopy(SMALL)
    job.precision = precision
    return job


def problems(job: TrainJob, processes: int = 1) -> list[Problem]:
    return [found for rule in NATIVE_RULES for found in rule(job, processes)]


def only(job: TrainJob) -> Problem:
    (found,) = problems(job)
    return found


@pytest.mark.parametrize("format", MULTIPLES)
def test_a_job_whose_sizes_fit_has_no_problem(format: GemmFormat) -> None:
    assert problems(small(Precision(format=format))) == []


def test_a_cpu_computes_nothing_natively() -> None:
    job = small(Precision(format=GemmFormat.mxfp8, backend=Backend.native))
    job.runtime.device = Device.cpu
    found = only(job)
    assert (found.path, found.nearest) == ("precision.backend", "emulated")


def test_plain_kernels_leave_nothing_to_the_hardware() -> None:
    job = small(Precision(format=GemmFormat.mxfp8))
    job.runtime.kernels = Kernels.plain
    assert only(job).path == "runtime.kernels"


@pytest.mark.parametrize("in_exception", [False, True])
def test_mxfp4_has_no_hardware(in_exception: bool) -> None:
    rule = PrecisionRule(format=GemmFormat.mxfp4, modules=["mlp"])
    job = small(Precision(format=GemmFormat.mxfp4))
    if in_exception:
        job = small(Precision(format=GemmFormat.bf16, exceptions=[rule]))
    found = only(job)
    place = "precision.exceptions.0.format" if in_exception else "precision.format"
    assert (found.path, found.nearest) == (place, "nvfp4")
    assert "precision.backend=emulated" in found.rule


def test_the_gemms_of_a_layer_have_one_format() -> None:
    rule = PrecisionRule(format=GemmFormat.bf16, gemms=[Gemm.dgrad])
    found = only(small(Precision(format=GemmFormat.mxfp8, exceptions=[rule])))
    assert (found.path, found.nearest) == ("precision.exceptions.0.gemms", "[]")


def test_an_exception_that_names_all_three_gemms_is_one_for_the_layer() -> None:
    rule = PrecisionRule(format=GemmFormat.bf16, gemms=list(Gemm))
    assert problems(small(Precision(format=GemmFormat.mxfp8, exceptions=[rule]))) == []


def test_float32_models_have_no_quantized_gemms() -> None:
    job = small(Precision(format=GemmFormat.mxfp8, unquantized=NumberFormat.fp32))
    assert only(job).path == "precision.unquantized"
    rule = PrecisionRule(format=GemmFormat.mxfp8, modules=["mlp"])
    job = small(Precision(format=GemmFormat.fp32, exceptions=[rule]))
    assert (only(job).path, only(job).nearest) == ("precision.format", "bf16")


def test_delayed_scaling_stands_beside_no_other_quantized_format() -> None:
    rule = PrecisionRule(format=GemmFormat.mxfp8, modules=["mlp"])
    found = only(small(Precision(format=GemmFormat.fp8_delayed, exceptions=[rule])))
    assert (found.path, found.nearest) == ("precision.format", "fp8_tensorwise")
    rule.format = GemmFormat.bf16
    assert problems(small(Precision(format=GemmFormat.fp8_delayed, exceptions=[rule]))) == []


def test_delayed_scaling_has_one_pass_through_a_model() -> None:
    job = small(Precision(format=GemmFormat.fp8_delayed))
    job.model.pattern = "MEM*M-/*E"
    assert "MTP" in only(job).rule
    job.model.pattern = "MEM*M-"
    job.parallel.virtual_pipeline = 2
    assert "virtual_pipeline" in only(job).rule


def test_delayed_scaling_has_float32_scales() -> None:
    job = small(Precision(format=GemmFormat.fp8_delayed, power_of_two_scales=True))
    assert only(job).path == "precision.power_of_two_scales"


def test_delayed_scaling_recomputes_no_activation_of_experts() -> None:
    job = small(Precision(format=GemmFormat.fp8_delayed))
    job.parallel.recompute = Recompute.selective
    job.parallel.recompute_modules = [RecomputeModule.mamba, RecomputeModule.moe_act]
    found = only(job)
    assert (found.path, found.nearest) == ("parallel.recompute_modules", "[mamba]")


def test_fsdp_is_not_joined_with_native_gemms() -> None:
    job = small(Precision(format=GemmFormat.mxfp8))
    job.parallel.fsdp = True
    assert only(job).path == "parallel.fsdp"


SIZES = [  # setting, what breaks mxfp8, format and value that it takes
    ("model.hidden_size", 48),
    ("model.mamba.heads", 8),
    ("model.attention.head_dim", 4),
    ("model.mlp.intermediate_size", 80),
    ("model.moe.intermediate_size", 80),
    ("model.moe.shared_intermediate_size", 80),
    ("model.moe.latent_size", 48),
    ("train.sequence_length", 24),
]


@pytest.mark.parametrize(("path", "value"), SIZES, ids=[path for path, _ in SIZES])
def test_a_size_that_no_product_takes_is_mended_by_the_nearest_one(path: str, value: int) -> None:
    job = small(Precision(format=GemmFormat.mxfp8))
    section, name = getattr(job, path.split(".")[0]), path.split(".")[1:]
    for part in name[:-1]:
        section = getattr(section, part)
    setattr(section, name[-1], value)
    (found,) = [one for one in check(job, 1) if one.path == path]
    assert "multiple of 32" in found.rule
    assert "precision.backend=emulated" in found.rule
    assert isinstance(found.nearest, int)
    setattr(section, name[-1], found.nearest)
    assert not [one for one in check(job, 1) if one.path == path]


def test_formats_need_different_multiples() -> None:
    job = small(Precision(format=GemmFormat.mxfp8))
    job.model.mlp.intermediate_size = 80  # 5 x 16
    assert only(job).path == "model.mlp.intermediate_size"
    job.precision.format = GemmFormat.fp8_blockwise
    assert problems(job) == []


def test_sizes_of_unquantized_layers_do_not_matter() -> None:
    rule = PrecisionRule(format=GemmFormat.bf16, modules=["mlp"])
    job = small(Precision(format=GemmFormat.mxfp8, exceptions=[rule]))
    job.model.mlp.intermediate_size = 81
    assert problems(job) == []


def test_core_wants_16_packed_rows_of_mamba_beside_any_fp8() -> None:
    """Its assertion stands in the constructor of the mixer, whatever in_proj itself is."""
    rule = PrecisionRule(format=GemmFormat.mxfp8, modules=["mlp"])
    job = small(Precision(format=GemmFormat.bf16, exceptions=[rule]))
    assert problems(job) == []
    job.model.mamba.heads = 30
    assert only(job).path == "model.mamba.heads"
    rule.format = GemmFormat.nvfp4
    assert problems(job) == []


def test_tensor_ranks_hold_parts_of_the_widths() -> None:
    job = small(Precision(format=GemmFormat.mxfp8))
    job.model.mlp.intermediate_size = 96
    assert problems(job) == []
    job.parallel.tensor = 2
    assert (
        "/ 2 = 48 " in {one.path: one.rule for one in problems(job)}["model.mlp.intermediate_size"]
    )


def test_latent_projections_see_the_tokens_of_one_tensor_rank() -> None:
    parallel, train = SUPER.parallel, SUPER.train
    whole = train.sequence_length * train.microbatch // parallel.context
    assert [size.value for size in token_sizes(SUPER, "moe.shared.fc1")] == [whole]
    assert degrees.splits_sequence(parallel)
    assert [size.value for size in token_sizes(SUPER, "moe.latent.up")] == [
        whole // parallel.tensor
    ]
    assert list(token_sizes(SUPER, "moe.experts.fc1")) == []  # padded by core


def broken_everywhere() -> list[TrainJob]:
    """Jobs that have every problem of this file, on a GPU."""
    precision = Precision(
        format=GemmFormat.fp8_delayed,
        unquantized=NumberFormat.fp32,
        power_of_two_scales=True,
        exceptions=[
            PrecisionRule(format=GemmFormat.bf16, modules=["mlp"], gemms=[Gemm.wgrad]),
            PrecisionRule(format=GemmFormat.mxfp4, modules=["attention"]),
        ],
    )
    job = small(precision)
    job.parallel.fsdp = True
    job.model.hidden_size = 50
    on_a_cpu = copy.deepcopy(job)
    on_a_cpu.runtime.device, on_a_cpu.precision.backend = Device.cpu, Backend.native
    return [job, on_a_cpu]


def test_every_rule_can_be_broken() -> None:
    unbroken = {
        rule.__name__ for rule in NATIVE_RULES for job in broken_everywhere() if list(rule(job, 1))
    }
    assert unbroken == {rule.__name__ for rule in NATIVE_RULES}


def test_emulated_gemms_are_free_of_all_this() -> None:
    for job in broken_everywhere():
        job.precision.backend = Backend.emulated
        assert problems(job) == []


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("nemotron3_super", 1024),
        ("nemotron3_ultra", 1536),
        ("nemotron_h_56b", 1536),
        ("nemotron_nano_v2_12b", 256),
    ],
)
def test_a_published_recipe_runs_on_a_gpu(name: str, processes: int) -> None:
    lines = [f"experiment={name}", f"processes={processes}", "runtime.device=cuda"]
    job = compose("check", lines)
    assert isinstance(job, TrainJob)
    assert quantized_linears(job)
    for phase in [job, *jobs_of(job)]:
        assert problems(phase, processes) == []


def odd(device: Device, backend: Backend = Backend.auto) -> TrainJob:
    """A job in FP8 with a width that no GPU takes."""
    job = small(Precision(format=GemmFormat.fp8_blockwise, backend=backend))
    job.model.mlp.intermediate_size = 81
    job.runtime.device = device
    return job


def test_an_odd_size_is_refused_where_a_gpu_is_meant() -> None:
    for job in (odd(Device.cuda), odd(Device.auto, Backend.native)):
        assert [one.path for one in check(job, 1)] == ["model.mlp.intermediate_size"]
        assert hardware_notes(job) == []


def test_an_odd_size_is_a_note_where_gemms_are_emulated() -> None:
    for job in (odd(Device.auto), odd(Device.cpu), odd(Device.cuda, Backend.emulated)):
        assert list(check(job, 1)) == []
        assert [one.path for one in hardware_notes(job)] == ["model.mlp.intermediate_size"]


def test_a_gpu_that_is_found_refuses_what_was_a_note_before() -> None:
    from hybrid_train.jobs.train import require_hardware

    with pytest.raises(ConfigError, match="intermediate_size = 81"):
        require_hardware(odd(Device.auto), torch.device("cuda"))
    require_hardware(odd(Device.auto), torch.device("cpu"))
    require_hardware(odd(Device.auto, Backend.emulated), torch.device("cuda"))
