"""The index of a blend of 10 billion tokens, ours and Megatron's, and the speed of the loader.

    python tests/benchmarks/data_plan.py [--tokens 10e9] [--sources 20] [--folder DIR]

Sources are real .idx files over .bin files of zeros without blocks on disk: document lengths are
log-normal, median 600 tokens. Each measurement runs in a process of its own; the peak is memory
above that after the imports. The loader reads random tokens of a smaller blend, one thread, beside
steps of the 60M ladder model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
warnings.filterwarnings("ignore")

LENGTH, VOCAB = 4096, 50_000
MEASURED = ("plain", "packed", "megatron")


def write_source(prefix: Path, tokens: int, seed: int, *, zeros: bool) -> None:
    """Write an index of documents of so many tokens in all, and their tokens."""
    from hybrid_train.data.token_files import write_documents

    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(600), 1.2, 2 * tokens // 600).astype(np.int32).clip(2, 10**6)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens)) + 1]
    if not zeros:
        write_documents(prefix, (random.integers(VOCAB, size=n) for n in lengths), vocab_size=VOCAB)
        return
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + np.uint64(1).tobytes() + np.uint8(8).tobytes())
        file.write(np.uint64(len(lengths)).tobytes() + np.uint64(len(lengths) + 1).tobytes())
        file.write(lengths.tobytes() + offsets.tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))


def job_of(prefixes: list[str], tokens: int, folder: Path, *, packed: bool) -> Any:
    from hybrid_train.schema.data import Data, Packing, Source
    from hybrid_train.schema.train import Train, TrainJob

    weights = np.linspace(1, 2, len(prefixes))
    return TrainJob(
        train=Train(tokens=str(tokens), sequence_length=LENGTH, microbatch=1, global_batch=256),
        data=Data(
            sources={f"s{n}": Source(train=[prefix]) for n, prefix in enumerate(prefixes)},
            blend={f"s{n}": float(weight) for n, weight in enumerate(weights)},
            packing=Packing.best_fit if packed else Packing.none,
            cache=str(folder / "cache"),
        ),
    )


def plans_of(prefixes: list[str], tokens: int, folder: Path, *, packed: bool) -> Any:
    """Open the sources and work out the rows, as a run does."""
    from hybrid_train.data.documents import FileDocuments, Joined
    from hybrid_train.data.index_cache import IndexCache
    from hybrid_train.data.plan import OpenSources, plan_phases
    from hybrid_train.planning.phases import lay_out

    job = job_of(prefixes, tokens, folder, packed=packed)
    documents = {
        name: Joined(name, [FileDocuments(source.train[0])])
        for name, source in job.data.sources.items()
    }
    opened = OpenSources(documents, {}, 0, IndexCache(folder / "cache", keep_from=1))
    plans = plan_phases(lay_out(job), opened, list(documents))
    for plan in plans:
        plan.prepare()
    return plans


def build_with_megatron(prefixes: list[str], tokens: int, folder: Path) -> None:
    """Build what Megatron-LM builds for the same blend, by the classes of its core."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: TID251
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: TID251

    class Facts:
        eod, vocab_size = 0, None
        unique_identifiers = {"eod": 0}  # noqa: RUF012

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    weights = np.linspace(1, 2, len(prefixes)).tolist()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=(prefixes, weights),
        split="100,0,0",
        path_to_cache=str(folder / "megatron"),
        tokenizer=Facts(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = [tokens // LENGTH, 0, 0]
    BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


def measure(way: str, tokens: int, folder: Path, prefixes: list[str]) -> None:
    """Build in this process; print seconds and bytes as JSON."""
    import torch  # noqa: F401  before the memory is looked at

    import hybrid_train.data.plan  # noqa: F401

    if way == "megatron":
        import megatron.core.datasets.gpt_dataset  # noqa: F401, TID251
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if way == "megatron":
        build_with_megatron(prefixes, tokens, folder)
    else:
        plans_of(prefixes, tokens, folder, packed=way == "packed")
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    kept = folder / ("megatron" if way == "megatron" else "cache")
    disk = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    print(json.dumps({"seconds": seconds, "peak": peak, "disk": disk}))


def in_own_process(way: str, tokens: int, prefixes: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure", way, str(tokens), folder, *prefixes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def time_loader(folder: Path) -> None:
    """Compare tokens/s of the loader with those of a step of the 60M model, in turns."""
    from hybrid_train.data.batch import RowReader
    from hybrid_train.data.loader import Loader
    from hybrid_train.runtime.start import process
    from tests.benchmarks.async_save import BATCH, engine_of
    from tests.benchmarks.async_save import LENGTH as STEP_LENGTH
    from tests.tiny import RUNTIME

    prefixes = [str(folder / f"small{n}") for n in range(20)]
    for number, prefix in enumerate(prefixes):
        write_source(Path(prefix), 1_000_000, number, zeros=False)
    with process(RUNTIME, seed=0):
        _, step = engine_of("ladder_60m")
        step()
        for packed in (False, True):
            (plan,) = plans_of(prefixes, 10_000_000, folder, packed=packed)
            loader = Loader(RowReader(plan.mixture), microbatch=1, global_batch=lambda _: 256)
            next(loader)
            loads, steps = [], []
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(64):
                    next(loader)
                loads.append(64 * LENGTH / (time.perf_counter() - start))
                start = time.perf_counter()
                step()
                steps.append(BATCH * STEP_LENGTH / (time.perf_counter() - start))
            load, use = float(np.median(loads)), float(np.median(steps))
            print(
                f"loader, {'packed' if packed else 'plain'} rows of {LENGTH}, 20 sources, one "
                f"thread: {load / 1e6:.2f}M tokens/s, {load / use:,.0f} times the {use:,.0f} "
                "tokens/s of a step of the 60M model"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--folder")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        way, tokens, folder, *prefixes = given.measure
        measure(way, int(tokens), Path(folder), prefixes)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for sources in (given.sources // 2, given.sources):
            for tokens in (int(given.tokens) // 4, int(given.tokens)):
                prefixes = [str(folder / f"{sources}-{tokens}-{n}") for n in range(sources)]
                for number, prefix in enumerate(prefixes):
                    write_source(Path(prefix), tokens // sources, number, zeros=True)
                for way in MEASURED:
                    found = in_own_process(way, tokens, prefixes)
                    print(
                        f"{tokens / 1e9:.1f}B tokens, {sources} sources, {way}: "
                        f"{found['seconds']:.1f} s, {found['peak'] / 1e6:.0f} MB of memory, "
                        f"{found['disk'] / 1e6:.1f} MB on disk",
                        flush=True,
                    )
        time_loader(folder)


if __name__ == "__main__":
    main()
