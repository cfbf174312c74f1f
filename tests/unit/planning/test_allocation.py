"""Buffers and stored bytes against closed forms of the smallest layers.

Against ranks that Megatron has built stands tests/unit/jobs/test_rehearse.py.
"""

from typing import Any

import pytest

from hybrid_train.planning.allocation import (
    Buffer,
    Place,
    allocated,
    buffers_of_rank,
    compare,
    stored_bytes,
)
from hybrid_train.planning.memory import Memory, memory
from hybrid_train.planning.stages import held_of_rank, stages
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.train import TrainJob
from tests.tiny import tiny_job

ROWS, HIDDEN, FFN = 64, 32, 64
MATRIX = ROWS * HIDDEN


def job_of(pattern: str, **degrees: Any) -> TrainJob:
    precision = Precision(format=GemmFormat.bf16)
    job = tiny_job(pattern, precision=precision, parallel=Parallel(**degrees))
    job.model.moe.bias_update_rate = 0
    return job


def test_tensors_begin_at_multiples_of_64_and_ranges_are_equal() -> None:
    # Embedding, norm and two weights of the MLP, final norm, head: of 32 elements the norms.
    (found,) = buffers_of_rank(job_of("-"), ROWS, rank=0, processes=3)
    elements = 2 * MATRIX + 2 * HIDDEN * FFN + 2 * HIDDEN
    aligned = elements + 2 * 32
    assert found.elements == elements
    assert found.padded == -(-aligned // 384) * 384  # lcm(3, 128)
    assert (found.copies, found.range) == (3, found.padded // 3)
    assert (found.weight_bytes, found.gradient_bytes, found.state_bytes) == (2, 4, 12)


def test_what_stays_in_float32_and_experts_have_buffers_of_their_own() -> None:
    dense, precise, experts = buffers_of_rank(job_of("ME", expert=2), ROWS, rank=0, processes=4)
    # A_log, D and dt_bias of four heads each; a weight in float32 needs no master.
    assert precise == Buffer(12, 256, 4, 4, 4, 8)
    moe = job_of("E").model.moe
    # Two matrices of each of two experts, each a multiple of 64; two processes hold the same.
    assert experts.elements == 2 * 2 * moe.latent_size * moe.intermediate_size
    assert (experts.padded, experts.copies) == (experts.elements, 2)
    assert dense.copies == 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_matrix_that_two_stages_share_ends_a_bucket(tied: bool) -> None:
    job = job_of("--", pipeline=2)
    job.model.tie_embeddings = tied
    (first,) = buffers_of_rank(job, ROWS, rank=0, processes=2 * 5)
    rest = 2 * HIDDEN * FFN + HIDDEN
    unit = 640  # lcm(5, 128)
    apart = -(-(rest + 32) // unit) * unit + -(-MATRIX // unit) * unit
    joined = -(-(rest + 32 + MATRIX) // unit) * unit
    assert apart > joined
    assert first.padded == (apart if tied else joined)


def test_without_the_distributed_optimizer_nothing_is_padded() -> None:
    job = job_of("MEM*M-", distributed_optimizer=False)
    buffers = buffers_of_rank(job, ROWS, rank=0, processes=2)
    assert all(one.padded == one.elements and one.copies == 1 for one in buffers)
    assert allocated(buffers) == memory(job, held_of_rank(stages(job, ROWS), 0), 2)


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "MEM*M-/*E/*E"])
@pytest.mark.parametrize("degrees", [{}, {"tensor": 2}, {"expert": 2}])
def test_buffers_hold_what_a_process_holds(pattern: str, degrees: dict[str, int]) -> None:
    job = job_of(pattern, **degrees)
    held = held_of_rank(stages(job, ROWS), 0)
    found = buffers_of_rank(job, ROWS, rank=0, processes=4)
    assert sum(one.elements for one in found) == held.total


def test_a_rank_that_holds_one_parameter_more_differs_by_it() -> None:
    job, place = job_of("M*-E"), Place(0, 0, 2, ROWS)
    whole = allocated(buffers_of_rank(job, ROWS, 0, 2))
    elements = held_of_rank(stages(job, ROWS), 0).total
    assert [one.difference for one in compare(job, place, elements, whole, 0)] == [0, 0, 0, 0]
    more = Memory(whole.weights + 2, whole.gradients + 4, whole.optimizer)
    found = list(compare(job, place, elements + 1, more, 0))
    assert [one.difference for one in found] == [1, 2, 4, 0]
    assert [one.what for one in found] == ["parameters", "weights", "gradients", "optimizer"]


def test_a_checkpoint_stores_weights_moments_and_masters_once() -> None:
    job = job_of("-", tensor=2)
    elements = 2 * MATRIX + 2 * HIDDEN * FFN + 2 * HIDDEN
    assert stored_bytes(job, ROWS) == elements * (2 + 12)
    job.precision.format = GemmFormat.fp32
    assert stored_bytes(job, ROWS) == elements * (4 + 8)


def test_what_has_no_master_or_no_state_is_stored_without() -> None:
    plain = stored_bytes(job_of("-"), ROWS)
    mamba = job_of("-M")
    held = (
        held_of_rank(stages(mamba, ROWS), 0).total
        - held_of_rank(stages(job_of("-"), ROWS), 0).total
    )
    assert stored_bytes(mamba, ROWS) - plain == held * 14 - 12 * 2  # 12 elements in float32
    tied = job_of("-")
    tied.model.tie_embeddings = True
    assert plain - stored_bytes(tied, ROWS) == MATRIX * 14
