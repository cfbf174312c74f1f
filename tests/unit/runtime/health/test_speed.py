"""The measurement itself, on this CPU: processes that meet, multiply and add up."""

import os
from pathlib import Path

import pytest
import torch

from hybrid_train.runtime.health import speed


@pytest.mark.slow
def test_two_processes_multiply_and_add_up() -> None:
    found = speed.measure("cpu", 2, threads=1)
    assert [one.device for one in found] == ["cpu 0", "cpu 1"]
    for one in found:
        assert (one.gemm_error, one.reduce_error) == (None, None)
        assert one.flops is not None
        assert one.flops > 0
        assert one.bytes_per_s is not None
        assert one.bytes_per_s > 0


@pytest.mark.slow
def test_a_process_alone_has_no_bus() -> None:
    (found,) = speed.measure("cpu", 1, threads=1)
    assert (found.reduce_error, found.bytes_per_s) == (None, None)


@pytest.mark.slow
def test_a_wrong_gemm_and_a_wrong_sum_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Loaded by every Python that is started: GEMMs and sums that are off by one.
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "import torch.distributed as dist\n"
        "multiply, add = torch.Tensor.__matmul__, dist.all_reduce\n"
        "torch.Tensor.__matmul__ = lambda a, b: multiply(a, b) + 1\n"
        "dist.all_reduce = lambda a, *args, **words: (add(a, *args, **words), a.add_(1))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[4])])
    monkeypatch.setenv("PYTHONPATH", path)
    for one in speed.measure("cpu", 2, threads=1):
        assert one.gemm_error == (
            "ArithmeticError: a GEMM of matrices of ones gives other numbers than 1024"
        )
        assert one.reduce_error == "ArithmeticError: the sum over 2 processes is not 3 everywhere"


def test_processes_that_do_not_answer_are_ended() -> None:
    found = speed.measure("cpu", 2, threads=1, limit_s=0.05)  # torch alone takes longer
    assert [one.gemm_error for one in found] == ["no answer in time"] * 2
    assert [one.reduce_error for one in found] == ["no answer in time"] * 2


def test_a_device_that_is_not_there_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (found,) = speed.measure("cuda", 1, threads=1)
    assert found.gemm_error is not None
    assert "NVIDIA" in found.gemm_error


def test_the_rate_counts_each_multiplication_and_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TIMED_S", 0.01)
    monkeypatch.setattr(speed, "_timed", lambda work, _: (work(), 0.5)[1])
    assert speed.gemm("cpu", 64) == 2 * 64**3 / 0.5
