"""A run goes from the CPU to a GPU and back, and the curve goes on."""

from pathlib import Path

import pytest
import torch

from tests.jobs.command import metrics, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEP = 256  # tokens
SETTINGS = ("data=streams", "schedule=constant", "schedule.peak_lr=3e-3", "precision=fp32")


def test_a_run_moves_from_the_cpu_to_a_gpu_and_back(tmp_path: Path) -> None:
    for device, steps in (("cpu", 10), ("cuda", 20), ("cpu", 30)):
        tokens = f"train.tokens={steps * STEP}"
        moved = train(tmp_path / "moved", *SETTINGS, tokens, f"runtime.device={device}")
        assert moved.code == 0, moved.err
    straight = train(tmp_path / "straight", *SETTINGS, f"train.tokens={30 * STEP}",
                     "runtime.device=cpu")  # fmt: skip
    assert straight.code == 0, straight.err
    lines = zip(metrics(tmp_path / "moved"), metrics(tmp_path / "straight"), strict=True)
    for line, reference in lines:
        # Products of the GPU may be TF32, with 10 bits: 2 ** -11 of a term in six layers, on losses
        # of about 5, and AdamW carries the difference on.
        assert line["loss"] == pytest.approx(reference["loss"], rel=0.01)
