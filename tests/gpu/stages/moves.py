"""The machine as `doctor` sees it, and a run that moves between CPU and GPU."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.check import ROOT
from tests.gpu.stages.machine import libraries, version_of
from tests.gpu.stages.notes import Notes

PARTS = {
    "transformer-engine": "transformer_engine.pytorch",
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
}
STEP = 256  # tokens of a step of tiny_cpu
STEPS = 3  # of the run: the first and the last on the CPU
# A GPU multiplies float32 as TF32, with 10 bits: 2^-11 of an operand, so twice that of a product;
# four layers and the head, one behind the other, and a step of the optimizer that carries it on.
TF32_LOSS = 5 * 2 * 2**-11
SETTINGS = ("data=streams", "schedule=constant", "schedule.peak_lr=3e-3", "precision=fp32",
            "checkpoint.interval=1", "runtime=auto", "runtime.threads=2")  # fmt: skip


def doctor(notes: Notes) -> None:
    """Run `doctor`; what it calls broken fails the stage, and each warning is a row."""
    found = json.loads(command(["doctor", "--json"], any_code=True))
    notes.flavour(", ".join(f"{name} {version}" for name, version in libraries().items()))
    broken = [one for one in found["checks"] if one["grade"] == "broken"]
    for one in found["checks"]:
        if one["grade"] != "ok":
            notes.words(one["check"], one["grade"], one["found"])
        for name, value in one["figures"].items():
            notes.row(f"{one['check']} {name}", value, headline=one["check"] == "GEMM")
    names = ", ".join(one["check"] for one in broken)
    notes.row("broken", len(broken), "checks", limit=0, note=names)
    if not notes.plain:
        faults = import_parts()
        note = ", ".join(faults)
        notes.row("parts that do not import", len(faults), limit=0, note=note)


def import_parts() -> list[str]:
    """Name parts of libraries that are installed and do not import; their packages hide it."""
    faults = []
    for name, part in PARTS.items():
        if version_of(name) == "none":
            continue
        try:
            importlib.import_module(part)
        except Exception as error:  # any: what a library for another machine raises is not known
            print(f"{part}: {type(error).__name__}: {error}")
            faults.append(part)
    return faults


def checkpoint(notes: Notes) -> None:
    """Train a step on the CPU, one on the GPU, one on the CPU; and all three on the CPU."""
    other = "cpu" if notes.plain else "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step, device in enumerate(("cpu", other, "cpu"), start=1):
            said = train(folder / "moved", step, device)
            if step == 2:
                notes.flavour(kernels_of(said))
        train(folder / "straight", STEPS, "cpu")
        pairs = zip(losses(folder / "moved"), losses(folder / "straight"), strict=True)
        for step, (moved, straight) in enumerate(pairs, start=1):
            notes.row(f"loss of step {step}", moved, "nats", headline=step == STEPS)
            off = abs(moved - straight) / straight
            reason = "equal" if notes.plain or step == 1 else "products in TF32"
            limit = 0.0 if reason == "equal" else TF32_LOSS
            notes.row(f"loss of step {step} off the CPU's", off, limit=limit, note=reason)


def train(run_dir: Path, steps: int, device: str) -> str:
    """Go on with a run until it has so many steps; return what it said."""
    tokens = f"train.tokens={steps * STEP}"
    words = ["train", "experiment=tiny_cpu", f"run_dir={run_dir}", *SETTINGS, tokens]
    return command([*words, f"runtime.device={device}"])


def command(words: list[str], *, any_code: bool = False) -> str:
    """Run `hybrid-train WORDS` and return its output; an error ends the stage.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_train", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200"}, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode and not any_code:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"hybrid-train {words[0]} ended with {done.returncode}: {last}")
    return done.stdout if any_code else done.stdout + done.stderr


def kernels_of(said: str) -> str:
    """What a run says of its kernels."""
    words = ("plain PyTorch", "Transformer Engine", "mamba-ssm", "scaled dot product")
    lines = [" ".join(line.split()) for line in said.splitlines() if any(w in line for w in words)]
    return "; ".join(lines[:3]) or "not said"


def losses(run_dir: Path) -> list[float]:
    """The loss of each step."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [line["loss"] for line in lines]
