"""Steps on packed rows against steps on plain ones of the same shape, and how full rows get.

    python tests/benchmarks/packing.py [--length 2048] [--rows 2] [--rounds 6] [--threads 1]

The model is that of conf/experiment/ladder_10m.yaml in float32 on a CPU. Both kinds take turns on
the same tokens in one process; compared is its CPU time, which other work on the machine disturbs
little. Lengths of documents are log-normal, with a spread as of web pages; what is longer than a
row is cut at it. The fill is of windows of 4096 pieces put together by best fit.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from hybrid_train.config import compose
from hybrid_train.data.batch import Batch
from hybrid_train.data.packing import best_fit, fill_row
from hybrid_train.jobs.networks import build_engine
from hybrid_train.megatron.data_parallel import build_groups
from hybrid_train.model.build import build_model
from hybrid_train.runtime.start import process
from hybrid_train.schema.runtime import Device, Runtime

VOCAB, PIECES, SPREAD = 4096, 4096, 1.2
MEDIANS = (25, 100, 400, 1600)  # tokens of a document


def places(median: int, length: int) -> np.ndarray:
    """Return the places that documents take."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), SPREAD, PIECES)
    return np.clip(drawn.astype(int), 1, length)


def packed_batch(median: int, rows: int, length: int) -> tuple[Batch, int]:
    """Return a microbatch of the rows of a window with the most documents but a tenth."""
    sizes = places(median, length)
    row_of = best_fit(sizes, length)
    chosen = np.argsort(np.bincount(row_of), kind="stable")[int(0.9 * (row_of.max() + 1)) :][:rows]
    generator = np.random.default_rng(1)
    filled = [
        fill_row([generator.integers(VOCAB, size=n + 1) for n in sizes[row_of == row]], length, 0)
        for row in chosen
    ]
    batch = Batch(**{k: torch.from_numpy(np.stack([row[k] for row in filled])) for k in filled[0]})
    return batch, int(np.isin(row_of, chosen).sum())


def show_fill() -> None:
    """Print how full the rows of a window are, and what it takes to find them."""
    print("median   row  rows   fill   ms")
    for length in (2048, 4096, 8192):
        for median in MEDIANS:
            sizes = places(median, length)
            start = time.perf_counter()
            count = best_fit(sizes, length).max() + 1
            spent = 1000 * (time.perf_counter() - start)
            fill = sizes.sum() / (count * length)
            print(f"{median:6} {length:5} {count:5} {fill:6.2%} {spent:4.1f}")


def show_speed(length: int, rows: int, rounds: int) -> None:
    """Print the CPU time of a step on packed rows over that on plain ones."""
    overrides = [
        "experiment=ladder_10m", "precision=fp32", "data=quickstart", "data.folder=/nonexistent",
        "run_dir=/nonexistent", f"model.vocab_size={VOCAB}", "train.tokens=1M",
        f"train.sequence_length={length}", f"train.microbatch={rows}", f"train.global_batch={rows}",
    ]  # fmt: skip
    job = compose.compose("train", overrides)
    groups = build_groups(job.parallel, 600)
    device = torch.device("cpu")
    engine = build_engine(job, build_model(job, groups, VOCAB, on_gpu=False), groups, device)

    def seconds(batch: Batch) -> float:
        start = time.process_time()
        engine.step(iter([batch]), tokens_seen=10**6)
        return time.process_time() - start

    print(f"{rows} x {length} tokens\nmedian  documents  plain s  packed s  packed / plain")
    for median in MEDIANS:
        packed, documents = packed_batch(median, rows, length)
        counted = torch.ones_like(packed.loss_weights)
        plain = replace(packed, padding=None, sequence_index=None, loss_weights=counted)
        seconds(packed), seconds(plain)
        pairs = np.array([(seconds(plain), seconds(packed)) for _ in range(rounds)])
        ratio = np.median(pairs[:, 1] / pairs[:, 0])
        print(
            f"{median:6} {documents:10} {pairs[:, 0].min():8.2f} {pairs[:, 1].min():9.2f} "
            f"{ratio:10.2f} (median of pairs)"
        )


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("length", 2048), ("rows", 2), ("rounds", 6), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    show_fill()
    with process(Runtime(device=Device.cpu, threads=options.threads), 0):
        show_speed(options.length, options.rows, options.rounds)


if __name__ == "__main__":
    main()
