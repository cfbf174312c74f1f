"""What chunks of logits save and cost: peak memory and time of a step with a large vocabulary.

    python tests/benchmarks/loss_memory.py [--sequences 4] [--before CHECKOUT] [--threads 2]

A step with chunks and one with all logits at once, each in a process of its own and one after the
other: peak of the resident memory of the whole process, and the processor's seconds of the last of
two steps. With --before the second is that of another checkout of this repository.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LENGTH, VOCAB, HIDDEN = 2048, 131_072, 256
SETTINGS = [
    "experiment=tiny_cpu", "run_dir=/nonexistent", "precision=fp32", "model.pattern=M-",
    f"model.hidden_size={HIDDEN}", f"model.vocab_size={VOCAB}", f"train.sequence_length={LENGTH}",
]  # fmt: skip


def main() -> None:
    """Measure both, and print their ratios; or one of them, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", choices=["chunks", "whole", "other"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.sequences, options.threads)
        return
    root = Path(__file__).parents[2]
    chunks = measured("chunks", root, options)
    whole = measured("other" if options.before else "whole", options.before or root, options)
    print(f"{options.sequences} x {LENGTH} tokens, {VOCAB} rows of {HIDDEN}: chunks / all at once")
    for name, one, other in zip(("peak, MB", "processor, s"), chunks, whole, strict=True):
        print(f"{name:14} {one:9.1f} / {other:9.1f} = {one / other:.2f}")


def measured(which: str, root: Path, options: argparse.Namespace) -> list[float]:
    """Run this program on one of the two alone."""
    command = [sys.executable, __file__, "--only", which]
    command += ["--sequences", str(options.sequences), "--threads", str(options.threads)]
    paths = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-2:]]


def measure(which: str, sequences: int, threads: int) -> None:
    """Take two steps; print the peak in MB and the seconds of the second step."""
    from hybrid_train.config import compose
    from hybrid_train.runtime.start import process

    sizes = [f"train.microbatch={sequences}", f"train.global_batch={sequences}"]
    job = compose.compose("train", [*SETTINGS, *sizes, f"runtime.threads={threads}"])
    with process(job.runtime, 0):
        if which == "whole":
            from hybrid_train.ops import logits

            logits.CHUNK_ELEMENTS = 2**62
        seconds = steps_of(job, sequences)
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) / 1024, seconds)


def steps_of(job: Any, sequences: int) -> float:
    """Build the engine of a job and take two steps; return the seconds of the second."""
    import torch
    from fixed_batch import fixed_batch

    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model

    groups = build_groups(job.parallel, 600)
    model = build_model(job, groups, VOCAB, on_gpu=False)
    engine = build_engine(job, model, groups, torch.device("cpu"))
    start = 0.0
    for _ in range(2):
        start = time.process_time()
        engine.step(iter([fixed_batch(VOCAB, sequences, LENGTH)]), tokens_seen=10**6)
    return time.process_time() - start


if __name__ == "__main__":
    main()
