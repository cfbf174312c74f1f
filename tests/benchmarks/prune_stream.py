"""Times `prune` on 3 GB of weights with an embedding of 0.5 GB, beside a plain copy of the files.

python tests/benchmarks/prune_stream.py [--rounds 3] [--folder DIR]

Each round copies the run folder and cuts a child out of it, all axes at once by random scores.
Both run in processes of their own, measured from when the command is imported: seconds, processor
time, and how far memory rises above that moment. `convert.py` says why files are written before.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.benchmarks.convert import fetch_memory, memory, processor_time

ROOT = Path(__file__).parents[2]
VOCAB = 131072
PARENT = (
    "pattern=M-M*-MEM-MEME/*E", "hidden_size=2048", f"vocab_size={VOCAB}", "attention.heads=32",
    "attention.kv_heads=4", "attention.head_dim=128", "mamba.heads=64", "mamba.head_dim=64",
    "mamba.state_size=128", "mamba.groups=8", "mlp.intermediate_size=10752", "moe.experts=48",
    "moe.top_k=4", "moe.intermediate_size=896", "moe.shared_intermediate_size=1792",
)  # fmt: skip
CHILD = (
    "hidden_size=1536", "mlp.intermediate_size=8064", "mamba.heads=48", "mamba.head_dim=56",
    "attention.heads=24", "moe.experts=40", "moe.intermediate_size=640",
    "moe.shared_intermediate_size=1280",
)  # fmt: skip


def main() -> int:
    """Make the parent, run the rounds, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files go; a temporary folder otherwise")
    parser.add_argument("--timed", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        return measure(*arguments.timed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_rounds(Path(folder), arguments.rounds)
    return 0


def run_rounds(folder: Path, rounds: int) -> None:
    """Print each round, and the medians of all."""
    parent = folder / "parent"
    made, embedding = make_parent(parent, folder / "ranking")
    print(f"parent: {made / 1e9:.2f} GB of weights in bfloat16, embedding {embedding / 1e9:.2f} GB")
    shares, peaks = [], []
    for _ in range(rounds):
        copy = timed("copy", parent, folder / "copy")
        cut = timed("prune", parent, folder / "child")
        kept = sum(one.stat().st_size for one in (folder / "child").rglob("*") if one.is_file())
        for name in ("copy", "child"):
            shutil.rmtree(folder / name)
        shares.append(copy["seconds"] / cut["seconds"])
        peaks.append(cut["peak"] / made)
        print(
            f"prune {made / cut['seconds'] / 1e9:.2f} GB/s of the parent, copy "
            f"{made / copy['seconds'] / 1e9:.2f} GB/s, share {shares[-1]:.2f}; processor "
            f"{cut['processor']:.1f} s, copy {copy['processor']:.1f} s; peak "
            f"{cut['peak'] / 1e6:.0f} MB above the import, {peaks[-1]:.1%} of the parent; child "
            f"{kept / 1e9:.2f} GB",
            flush=True,
        )
    print(
        f"median share of a plain copy {statistics.median(shares):.2f}, highest peak "
        f"{max(peaks):.1%} of the parent"
    )


def make_parent(run_dir: Path, ranking: Path) -> tuple[int, int]:
    """Write a run folder of random weights and a ranking of them; return bytes, and embedding's."""
    import torch

    from hybrid_train.anatomy.kinds import EMBEDDING
    from hybrid_train.anatomy.layers import stored_tensors
    from hybrid_train.checkpoint import layout
    from hybrid_train.checkpoint.tensor_files import CheckpointWriter
    from hybrid_train.config import frozen
    from hybrid_train.config.compose import compose
    from hybrid_train.hf.read import imported_job
    from tests.random_checkpoints import random_ranking

    model = compose("count", [f"model.{one}" for one in PARENT]).model
    folder = layout.path_of(run_dir, 0)
    folder.mkdir(parents=True)
    pool = torch.randn(2**25).to(torch.bfloat16)  # drawing them all would take minutes
    writer, sizes = CheckpointWriter(folder), {}
    for key, shape, _ in stored_tensors(model, VOCAB):
        place, left = writer.place(key, shape, 0, shape, torch.bfloat16), math.prod(shape)
        values = torch.cat([pool] * math.ceil(left / len(pool)))[:left]
        place.write(values)
        sizes[key] = values.nbytes
    writer.finish()
    layout.write_position(folder, {"step": 0, "tokens": 0})
    frozen.freeze(imported_job(model, run_dir, 8192, torch.bfloat16), run_dir)
    random_ranking(model, folder, ranking)
    return sum(sizes.values()), sizes[EMBEDDING.stored]


def timed(way: str, source: Path, target: Path) -> dict[str, float]:
    """Copy or prune in a new process."""
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--timed", way, str(source), str(target)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, source: str, target: str) -> int:
    """Copy or prune in this process; print what it took."""
    from hybrid_train.config.compose import compose
    from hybrid_train.jobs import prune as job

    sizes = [f"model.{one}" for one in CHILD]
    words = [f"checkpoint={source}", f"ranking={Path(source).with_name('ranking')}", *sizes]
    if way == "copy":
        work = partial(shutil.copytree, source, target)
    else:
        work = partial(job.run, compose("prune", [*words, f"output={target}"]))
    fetch_memory(Path(source), Path(target).with_name("fetched"))
    before, processor, start = memory("VmRSS"), processor_time(), time.perf_counter()
    work()
    seconds, processor = time.perf_counter() - start, processor_time() - processor
    peak = memory("VmHWM") - before
    print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
