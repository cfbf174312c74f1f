"""Trains the same runs with two checkouts and compares them to the bit: proof of a refactoring.

    python -m tests.equal_runs BEFORE [NAME ...]

BEFORE is another checkout. Each takes 50 steps of an experiment in processes of its own, and this
one goes on with the folder of the other from its checkpoint at half of them. What is compared are
all metrics but those of the clock, and every tensor of the last checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

HERE = Path(__file__).parents[1]
STEPS = 50
SHORT = ("runtime.threads=1", "train.validation_interval=25", "checkpoint.interval=25")
# Of other sizes than the experiments have where their own would take hours on a CPU.
RUNS = {
    "quickstart": (
        *("experiment=quickstart", "data=quickstart_small"),
        *("train.sequence_length=128", "train.global_batch=4", "train.validation_batches=4"),
        f"train.tokens={STEPS * 128 * 4}",
    ),
    "ladder_3m": (
        *("experiment=ladder_3m", "data=quickstart_small", "model.vocab_size=512"),
        *("train.sequence_length=128", "train.global_batch=2", "train.validation_batches=4"),
        f"train.tokens={STEPS * 128 * 2}",
    ),
    # Super's recipe and kinds of layers, two MTP depths and latent experts; its sizes cut down.
    "tiny_super": (
        *("experiment=nemotron3_super", "data=streams", "parallel=single", "runtime=cpu"),
        *("model.pattern=MEM*ME/*E/*E", "model.hidden_size=64", "model.vocab_multiple=16"),
        *("model.attention.heads=4", "checkpoint.async_save=false"),
        *("model.attention.kv_heads=2", "model.attention.head_dim=16", "model.mamba.heads=4"),
        *("model.mamba.head_dim=32", "model.mamba.groups=2", "model.mamba.chunk_size=16"),
        *("model.mamba.state_size=16", "model.moe.experts=8", "model.moe.top_k=2"),
        *("model.moe.latent_size=32", "model.moe.intermediate_size=48"),
        *("model.moe.shared_intermediate_size=64", "train.phases=[]", "train.batch_ramp.tokens=0"),
        *("train.sequence_length=64", "train.global_batch=2", "train.microbatch=1"),
        *("schedule.warmup_tokens=0", "schedule.decay_tokens=1k", "train.validation_batches=2"),
        f"train.tokens={STEPS * 64 * 2}",
    ),
}
CLOCK = ("tokens_per_s", "step_time_s", "pause_s", "save_time_s", "validation_time_s", "mfu")


def run(checkout: Path, name: str, *words: str) -> None:
    """Run a command with the code of a checkout."""
    ended = subprocess.run(
        [sys.executable, "-m", "hybrid_train", *words],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        sys.exit(f"{name} with {checkout}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run without those that the clock decides."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in CLOCK}
        for line in lines
    ]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of the last checkpoint."""
    last = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(last, whole)
        return dict(flat(torch.load(whole, weights_only=False)))


def flat(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


def compare(name: str, before: Path, folder: Path) -> bool:
    """Train a run with both checkouts, print what differs, and tell whether nothing does."""
    folders = {which: folder / name / which for which in ("before", "now", "resumed")}
    for which, checkout in {"before": before, "now": HERE}.items():
        run(checkout, name, "train", *RUNS[name], *SHORT, f"run_dir={folders[which]}")
    shutil.copytree(folders["before"], folders["resumed"])
    shutil.rmtree(sorted((folders["resumed"] / "checkpoints").glob("step_*"))[-1])
    run(HERE, name, "resume", f"run_dir={folders['resumed']}")
    known = folders.pop("before")
    equal = [is_equal(f"{name}, {which}", known, one) for which, one in folders.items()]
    return all(equal)


def is_equal(name: str, known_dir: Path, found_dir: Path) -> bool:
    """Print what differs between two runs, and tell whether nothing does."""
    old, new = metrics(known_dir), metrics(found_dir)
    known, found = tensors(known_dir), tensors(found_dir)
    lines = [
        number for number, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]
    ]
    other = [key for key in known if key not in found or not torch.equal(known[key], found[key])]
    extra = sorted(set(found) - set(known))
    print(
        f"{name}: {len(new)} lines of metrics ({len(old)} before), {len(lines)} differ; "
        f"{len(found)} tensors ({len(known)} before), {len(other) + len(extra)} differ",
        flush=True,
    )
    for number in lines[:3]:
        print(f"  before {old[number]}\n  now    {new[number]}")
    for key in (*other[:5], *extra[:5]):
        print(f"  {key}")
    return len(old) == len(new) and not (lines or other or extra)


def main() -> int:
    before, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(name, Path(before).resolve(), Path(folder)) for name in names or RUNS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
