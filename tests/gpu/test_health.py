"""The measurement of `doctor` on GPUs: products and sums are right, and figures come back.

Written for a GPU and not yet run on one.
"""

import pytest

from hybrid_train.runtime.health import speed

pytestmark = pytest.mark.gpu


def test_every_gpu_multiplies_and_adds_up() -> None:
    import torch

    number = torch.cuda.device_count()
    found = speed.measure("cuda", number, threads=1)
    assert [one.device for one in found] == [f"cuda {n}" for n in range(number)]
    for one in found:
        assert (one.gemm_error, one.reduce_error) == (None, None)
        assert one.flops is not None
        assert one.flops > 0
        assert (one.bytes_per_s is None) == (number == 1)
