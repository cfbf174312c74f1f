"""What a process holds, against closed forms and against the counts of the whole model.

Against built models, under any layout, stands test_core_accepts.py.
"""

import dataclasses
from typing import Any

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.layers import main_layers
from hybrid_train.planning.degrees import expert_data_parallel
from hybrid_train.planning.memory import Held, held, memory
from hybrid_train.planning.stages import stages
from hybrid_train.schema.model import Mtp
from hybrid_train.schema.optimizer import (
    AdamW,
    MasterFormat,
    MomentFormat,
)
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import GemmFormat, Precision, PrecisionRule
from hybrid_train.schema.train import TrainJob
from tests.tiny import tiny_job

ROWS, HIDDEN = 64, 32


def job_of(pattern: str, **degrees: Any) -> TrainJob:
    job = tiny_job(pattern, parallel=Parallel(**degrees))
    job.model.moe.bias_update_rate = 0  # expert biases are buffers: counted, not held
    return job


def whole(job: TrainJob, layers: str, *, last: bool) -> int:
    """Parameters that every tensor rank holds whole: norms, routers, latent projections."""
    moe = job.model.moe
    of_experts = HIDDEN * (moe.experts + 2 * (moe.latent_size or 0))
    total = HIDDEN * len(layers) + of_experts * layers.count("E")
    if last:
        mtp = parse(job.model.pattern).mtp
        total += HIDDEN  # final norm
        if mtp:  # three norms of the block, and its layers
            total += 3 * HIDDEN + HIDDEN * len(mtp) + of_experts * mtp.count("E")
    return total


PATTERNS = ["M", "*", "-", "E", "MEM*M-", "MEM*M-/*E/*E"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_one_process_holds_the_whole_model(pattern: str, tied: bool) -> None:
    job = job_of(pattern)
    job.model.tie_embeddings = tied
    (stage,) = stages(job, ROWS)
    assert stage.held.total == counts.parameters(job.model, ROWS).total


@pytest.mark.parametrize("pipeline", [2, 3, 6])
def test_the_ranks_of_a_pipeline_hold_the_whole_model(pipeline: int) -> None:
    job = job_of("MEM*M-", pipeline=pipeline)
    found = sum(stage.held.total for stage in stages(job, ROWS))
    assert found == counts.parameters(job.model, ROWS).total


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_behind_a_pipeline_holds_one_more_embedding(depths: int) -> None:
    job = job_of("MEM*M-" + "/*E" * depths, pipeline=2)
    found = sum(stage.held.total for stage in stages(job, ROWS))
    assert found == counts.parameters(job.model, ROWS).total + ROWS * HIDDEN


def test_a_tied_pipeline_holds_the_matrix_at_both_ends() -> None:
    job = job_of("MEM*M-", pipeline=2)
    job.model.tie_embeddings = True
    found = sum(stage.held.total for stage in stages(job, ROWS))
    assert found == counts.parameters(job.model, ROWS).total + ROWS * HIDDEN


def test_mtp_blocks_of_their_own_are_held_once_per_depth() -> None:
    job = job_of("MEM*M-/*E/*E")
    (shared,) = stages(job, ROWS)
    job.model.mtp = Mtp(repeated_block=False)
    (own,) = stages(job, ROWS)
    assert own.held.total == counts.parameters(job.model, ROWS).total > shared.held.total


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(2, 1, 2), (2, 4, 1), (1, 2, 1)])
def test_the_ranks_together_hold_the_model_and_copies_of_what_is_whole(
    pattern: str, tensor: int, expert: int, expert_tensor: int
) -> None:
    job = job_of(pattern, tensor=tensor, expert=expert, expert_tensor=expert_tensor)
    (stage,) = stages(job, ROWS)
    copies = (tensor - 1) * whole(job, parse(pattern).main, last=True)
    all_or_none = tensor * stage.held.dense + expert * expert_tensor * stage.held.expert
    assert all_or_none == counts.parameters(job.model, ROWS).total + copies


def test_a_routed_expert_is_two_matrices_of_the_latent_width() -> None:
    job = job_of("E", tensor=2, expert=2)
    found = held(job.model, job.parallel, main_layers(job.model), ROWS, first=False, last=False)
    moe = job.model.moe
    # Half of the experts, half of each.
    assert found.expert == moe.experts // 2 * 2 * moe.latent_size * moe.intermediate_size // 2
    shared = 2 * HIDDEN * moe.shared_intermediate_size // 2
    assert found.dense == shared + HIDDEN * (1 + moe.experts + 2 * moe.latent_size)


def test_a_middle_stage_holds_its_layers_alone() -> None:
    job = job_of("M-M", pipeline=3)
    found = held(
        job.model, job.parallel, main_layers(job.model)[1:2], ROWS, first=False, last=False
    )
    assert found == Held(dense=HIDDEN + 2 * HIDDEN * job.model.mlp.intermediate_size)


def test_held_parameters_add_and_multiply_by_kind() -> None:
    assert Held(3, 5) + Held(10, 20) == Held(13, 25)
    assert Held(3, 5).times(4) == Held(12, 20)
    assert Held(3, 5).total == 8


def formats(job: TrainJob, **changes: Any) -> TrainJob:
    return dataclasses.replace(job, precision=Precision(**changes))


def test_bf16_keeps_two_bytes_and_its_state_in_fp32() -> None:
    job = formats(job_of("M", distributed_optimizer=False), format=GemmFormat.bf16)
    kept = memory(job, Held(1000), processes=1)
    # Master weights and two moments of four bytes each.
    assert (kept.weights, kept.gradients, kept.optimizer) == (2000, 4000, 12_000)
    assert kept.total == 18_000


def test_what_stays_in_float32_takes_two_bytes_more_and_no_master() -> None:
    """A_log, D and dt_bias of a Mamba layer: four heads each."""
    job = formats(job_of("M", distributed_optimizer=False), format=GemmFormat.bf16)
    (stage,) = stages(job, ROWS)
    assert stage.held.in_fp32 == 3 * 4
    kept, total = memory(job, stage.held, processes=1), stage.held.total
    assert kept.weights == 2 * total + 2 * 12
    assert kept.gradients == 4 * total
    assert kept.optimizer == 12 * total - 4 * 12
    job.precision.reduce_gradients_in_fp32 = False
    assert memory(job, stage.held, processes=1).gradients == 2 * total + 2 * 12


def test_gradients_may_stay_in_bf16() -> None:
    job = formats(job_of("M"), format=GemmFormat.bf16, reduce_gradients_in_fp32=False)
    assert memory(job, Held(1000), processes=1).gradients == 2000


def test_fp32_needs_no_master_weights() -> None:
    job = formats(job_of("M"), format=GemmFormat.fp32, reduce_gradients_in_fp32=False)
    kept = memory(job, Held(1000), processes=1)
    assert (kept.weights, kept.gradients, kept.optimizer) == (4000, 4000, 8000)


@pytest.mark.parametrize(
    ("first", "second", "moments"),
    [("bfloat16", "bfloat16", 4), ("float8", "float16", 3), ("float32", "float16", 6)],
)
def test_lowered_moments_take_their_bytes_and_masters_two(
    first: str, second: str, moments: int
) -> None:
    job = formats(job_of("M"), format=GemmFormat.bf16)
    job.optimizer = AdamW(first_moment=MomentFormat(first), second_moment=MomentFormat(second))
    assert memory(job, Held(1000), processes=1).optimizer == 1000 * (moments + 2)
    job.precision.format = GemmFormat.fp32  # no masters
    assert memory(job, Held(1000), processes=1).optimizer == 1000 * moments


def test_a_weight_in_fp8_takes_one_byte_and_the_rest_two() -> None:
    """Of the second stage the first layer is in bfloat16, and of experts a rank has a half."""
    job = job_of("M*-E/E", pipeline=2, expert=2)
    job = formats(job, format=GemmFormat.fp8_blockwise, fp8_param_gather=True)
    job.precision.exceptions = [PrecisionRule(format=GemmFormat.bf16, layers="3")]
    first, last = (stage.held for stage in stages(job, ROWS))
    sizes, moe = job.model, job.model.moe
    mamba = HIDDEN * (2 * 64 + 2 * 16 + 4) + 64 * HIDDEN  # in_proj, out_proj
    attention = HIDDEN * (4 + 2 * 2) * sizes.attention.head_dim + 4 * 8 * HIDDEN
    assert first.in_fp8 == mamba + attention
    experts = 2 * 2 * moe.latent_size * moe.intermediate_size
    shared = 2 * HIDDEN * moe.shared_intermediate_size
    assert last.in_fp8 == experts + shared + 2 * HIDDEN * moe.latent_size
    kept = memory(job, last, processes=4)
    assert kept.weights == 2 * last.total - last.in_fp8
    job.precision.fp8_param_gather = False
    assert [stage.held.in_fp8 for stage in stages(job, ROWS)] == [0, 0]


def test_masters_in_float16_take_two_bytes() -> None:
    job = formats(job_of("M"), format=GemmFormat.bf16)
    job.optimizer = AdamW(master_weights=MasterFormat.float16)
    assert memory(job, Held(1000), processes=1).optimizer == 1000 * (8 + 2)


def test_the_distributed_optimizer_splits_state_over_equal_processes() -> None:
    job = formats(job_of("M", tensor=2, pipeline=2, context=2), format=GemmFormat.bf16)
    # 64 / (2 * 2 * 2) = 8 data-parallel ranks, and context ranks hold the same too.
    assert memory(job, Held(1600), processes=64).optimizer == 12 * 100
    # A part that does not divide is rounded up: the largest share.
    assert memory(job, Held(1601), processes=64).optimizer == 12 * 101
    job.parallel.distributed_optimizer = False
    assert memory(job, Held(1600), processes=64).optimizer == 12 * 1600


def test_the_state_of_experts_is_split_over_fewer() -> None:
    job = formats(job_of("E", tensor=2, expert=8, expert_tensor=1), format=GemmFormat.bf16)
    assert expert_data_parallel(job.parallel, 32) == 4
    kept = memory(job, Held(dense=1600, expert=400), processes=32)
    assert kept.optimizer == 12 * (1600 // 16 + 400 // 4)
    assert (kept.weights, kept.gradients) == (2 * 2000, 4 * 2000)
