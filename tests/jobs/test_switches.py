"""Switches in whole runs on a CPU: what it leaves out is said, and numbers do not change."""

from pathlib import Path

import pytest

from tests.jobs.command import metrics, train

STEPS = ("train.tokens=2560", "checkpoint.interval=0", "train.validation_interval=0")
PLAIN = ("model.moe.latent_size=null", *STEPS)
LEFT_OUT = (
    "gpu.cuda_graphs=layers", "gpu.fused_permutation=true", "gpu.fused_router=true",
    "gpu.offloaded_parts=[core_attn]", "gpu.high_priority_groups=[ep]",
)  # fmt: skip


def losses(folder: Path, *words: str) -> tuple[list[float], str]:
    done = train(folder, *words)
    assert done.code == 0, done.said
    return [line["loss"] for line in metrics(folder)], done.said


@pytest.mark.slow
def test_a_cpu_trains_as_without_the_switches_of_a_gpu_and_names_them(tmp_path: Path) -> None:
    expected, _ = losses(tmp_path / "plain", *PLAIN)
    found, said = losses(tmp_path / "switched", *PLAIN, *LEFT_OUT)
    assert found == expected
    (line,) = [one for one in said.splitlines() if "left out here" in one]
    for name in ("gpu.cuda_graphs", "gpu.fused_permutation", "gpu.high_priority_groups"):
        assert f"{name} needs a GPU" in line


@pytest.mark.slow
def test_a_run_whose_processes_drift_apart_ends_with_tensor_and_rank(tmp_path: Path) -> None:
    words = (*STEPS, "recovery.checksum_interval=1", "hooks=[{kind: 'tests.turned_bit:Settings'}]")
    done = train(tmp_path, *words, processes=2)
    assert done.code != 0
    assert "step 3: processes that should hold the same weights do not" in done.err
    assert "embedding.word_embeddings.weight of rank 0, 1" in done.err
