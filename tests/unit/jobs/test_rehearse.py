"""`rehearse` builds ranks at true size, equal to the byte, and fails where anything differs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.jobs import cli
from hybrid_train.jobs.run_plan import RunPlan
from hybrid_train.planning import allocation
from hybrid_train.planning.allocation import FILES_OF_ALL, stored_bytes
from hybrid_train.planning.memory import Held

pytestmark = [
    pytest.mark.filterwarnings(r"ignore::Warning:megatron\."),
    pytest.mark.filterwarnings(r"ignore::Warning:torch\."),
]
PUBLISHED = {
    "nemotron_h_56b": (1536, ["diverse"]),
    "nemotron3_nano": (512, ["1", "long"]),
    "nemotron3_super": (1024, ["1", "long"]),
    "nemotron3_ultra": (1536, ["1", "long"]),
}


@pytest.fixture(scope="module", autouse=True)
def nothing_joined() -> Iterator[None]:
    """A rank that is rehearsed makes the only process group there is."""
    import torch.distributed as dist

    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


def rehearse(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert cli.main(["rehearse", *words, "twin=false", "--json"]) == code
    return json.loads(capsys.readouterr().out)


TINY = ("experiment=tiny_cpu", "precision=bf16", "processes=8", "train.global_batch=16")
LAYOUTS = (
    "parallel.tensor=2",
    "parallel.pipeline=2 model.tie_embeddings=true",
    "parallel.pipeline=2 parallel.virtual_pipeline=2",
    "parallel.context=2",
    "parallel.expert=2 parallel.tensor=2 parallel.expert_tensor=1",
    "parallel.distributed_optimizer=false",
    "precision.reduce_gradients_in_fp32=false",
    "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true",
    "precision=nvfp4",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_built_rank_of_any_layout_has_the_bytes_that_were_planned(
    capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    words = (*TINY, "model.pattern=MEM*M-ME/*E", *layout.split())
    found = rehearse(capsys, *words)
    assert found["sound"]
    (one,) = found["layouts"]
    assert [row["difference"] for row in one["ranks"]] == [0] * len(one["ranks"])
    assert {row["what"] for row in one["ranks"]} == {
        "parameters", "weights", "gradients", "optimizer",
    }  # fmt: skip
    assert all(row["built"] > 0 for row in one["ranks"])


def test_a_formula_that_is_off_by_one_parameter_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = allocation.stages.held_of_rank

    def one_less(*args: Any) -> Held:
        held = counted(*args)
        return replace(held, dense=held.dense - 1)

    monkeypatch.setattr(allocation.stages, "held_of_rank", one_less)
    found = rehearse(capsys, *TINY, code=1)
    assert not found["sound"]
    by_name = {row["what"]: row["difference"] for row in found["layouts"][0]["ranks"]}
    assert by_name["parameters"] == 1


def test_the_files_of_all_ranks_hold_each_tensor_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of eight ranks is built: what they write is together what a checkpoint stores."""
    words = (*TINY, "parallel=tp2_pp2", "model.pattern=MEM*M-ME/*E", "parallel.expert=2")
    total = stored = 0
    for rank in range(8):
        (one,) = rehearse(capsys, *words, f"rank={rank}")["layouts"]
        total, stored = total + one["saved"]["largest"], one["saved"]["total"]
    plan = RunPlan.of(compose("check", list(words)))
    assert total == stored == stored_bytes(plan.first, plan.rows)


def test_the_time_of_a_checkpoint_is_that_of_the_slower_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = "storage_gb_per_s=0.001", "process_gb_per_s=0.0001"
    saved = rehearse(capsys, *TINY, *rates)["layouts"][0]["saved"]
    assert saved["files"] == 8 + len(FILES_OF_ALL)
    assert saved["seconds"] == max(saved["total"] / 1e6, saved["largest"] / 1e5)
    assert rehearse(capsys, *TINY)["layouts"][0]["saved"]["seconds"] is None


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("rank=8", "rank"),
        ("parallel.fsdp=true", "parallel.fsdp"),
        ("optimizer.first_moment=bfloat16", "optimizer.first_moment"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    capsys: pytest.CaptureFixture[str], words: str, path: str
) -> None:
    assert cli.main(["rehearse", *TINY, words]) == 2
    assert f"\n  {path} = " in capsys.readouterr().err


def test_the_table_says_what_is_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rehearse", *TINY, "twin=false", "parallel=tp2"]) == 0
    shown = capsys.readouterr().out
    assert "8 processes: tensor 2 x pipeline 1 x context 1 x data 4, expert 1" in shown
    assert len([line for line in shown.splitlines() if line.rstrip().endswith("  equal")]) == 4
    assert "storage_gb_per_s=N" in shown


@pytest.mark.slow
def test_a_twin_of_each_layout_takes_a_step() -> None:
    """In a process of its own: the ranks are forked from it."""
    phases = "train.phases=[{name: a},{name: b,start: 50%,tensor: 2}]"
    command = [sys.executable, "-m", "hybrid_train", "rehearse", *TINY, phases, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (one["twin"] for one in json.loads(done.stdout)["layouts"])
    assert first["faults"] == second["faults"] == []
    assert " on 2 processes: tensor 1 x pipeline 1" in first["layout"]
    assert " on 4 processes: tensor 2 x pipeline 1" in second["layout"]
    assert 0 < sum(calls for calls, _ in first["calls"].values()) < 500


@pytest.mark.slow
def test_a_checkpoint_has_the_files_that_were_laid_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of a run on two processes: torch adds up to two kilobytes around each tensor."""
    words = ("experiment=tiny_cpu", "parallel.tensor=2")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    command = [*torchrun, "hybrid_train", "train", *words, f"run_dir={tmp_path / 'run'}"]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sizes.keys() == {*FILES_OF_ALL, "__0_0.distcp", "__1_0.distcp"}
    for rank in (0, 1):
        (one,) = rehearse(capsys, *words, "processes=2", f"rank={rank}")["layouts"]
        assert one["saved"]["files"] == len(sizes)
        planned = one["saved"]["largest"]
        assert planned < sizes[f"__{rank}_0.distcp"] < planned + 2000 * 204


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_ranks_of_published_layouts_are_equal_to_the_byte(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    processes, phases = PUBLISHED[name]
    found = rehearse(capsys, f"experiment={name}", f"processes={processes}")
    assert [one["phase"] for one in found["layouts"]] == phases
    for one in found["layouts"]:
        assert {row["difference"] for row in one["ranks"]} == {0}
