"""Speed and MFU."""

import pytest
import torch

from hybrid_train.tracking.throughput import Throughput, gpu_peak, peak_flops


def test_speed_and_mfu_have_their_closed_forms() -> None:
    throughput = Throughput(peak_flops=1e12, num_devices=2)
    measured = throughput.measure(tokens=50_000, step_time_s=0.5, flops_per_token=6e6)
    assert measured == pytest.approx({"tokens_per_s": 100_000, "step_time_s": 0.5, "mfu": 0.3})


def test_without_a_peak_there_is_no_mfu() -> None:
    measured = Throughput(None, 1).measure(tokens=10, step_time_s=1.0, flops_per_token=6e6)
    assert measured.keys() == {"tokens_per_s", "step_time_s"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),  # and not that of a B200
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_gpus_are_known_by_name(name: str, tflops: float) -> None:
    peak = gpu_peak(name)
    assert peak.flops == tflops * 1e12
    assert name in peak.source


def test_an_unknown_gpu_has_no_peak_and_says_how_to_give_one() -> None:
    peak = gpu_peak("NVIDIA GeForce RTX 4090")
    assert peak.flops is None
    assert "no card of conf/hardware names NVIDIA GeForce RTX 4090" in peak.source
    assert "runtime.peak_tflops" in peak.source


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000"),
    ],
)
def test_a_card_without_a_figure_has_no_peak_and_says_where_it_would_stand(
    name: str, card: str
) -> None:
    peak = gpu_peak(name)
    assert peak.flops is None
    assert f"conf/hardware/{card}.yaml has no figure" in peak.source


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
def test_another_form_or_a_slice_of_a_gpu_does_not_get_its_peak(name: str) -> None:
    assert gpu_peak(name).flops is None


def test_the_figure_of_the_user_goes_first() -> None:
    peak = peak_flops(torch.device("cpu"), peak_tflops=1.5)
    assert peak.flops == 1.5e12
    assert peak.source == "1.5 TFLOP/s (runtime.peak_tflops)"


def test_a_cpu_is_measured_and_says_so() -> None:
    peak = peak_flops(torch.device("cpu"))
    assert peak.flops is not None
    assert peak.flops > 0
    assert "float32 GEMM" in peak.source
    assert f"{torch.get_num_threads()} thread" in peak.source
