"""Masks before quantization on the shards of two tensor-parallel ranks."""

from hybrid_train.schema.parallel import Parallel
from tests.distributed.launch import run_distributed
from tests.masking import compare
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


def _compare() -> bool:
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    parallel = Parallel(tensor=2)
    groups = build_groups(parallel, timeout_s=60)
    try:
        compare(groups, parallel)
    finally:
        destroy_groups()
    return True


def test_masks_before_quantization_are_masked_weights_under_tensor_parallelism() -> None:
    assert run_distributed(_compare, 2) == [True, True]
