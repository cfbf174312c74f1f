"""Reading documents: ours, Megatron's, and ours over HTTP, in turns of one run.

    python tests/benchmarks/read_documents.py [--rounds 7]

20,000 documents of 20 to 400 tokens (two bytes each) in random order, each read whole. Times are
microseconds of processor time a document, the best of the rounds; they take turns, so that a busy
machine slows all.
Over HTTP: from a server of this process; `cold` fetches every block, `warm` finds all of them in
the folder.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402, TID251

from hybrid_train.data.documents import Documents, FileDocuments  # noqa: E402
from hybrid_train.data.token_files import write_documents  # noqa: E402
from hybrid_train.schema.data import Remote  # noqa: E402
from tests.unit.data.http_folder import serve  # noqa: E402

COUNT = 20_000


def per_document(action: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    action()
    return (clock() - start) / COUNT * 1e6


def read_all(documents: Documents, order: list[int], lengths: list[int]) -> None:
    for k in order:
        documents.read(k, 0, lengths[k])


def main(rounds: int) -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, serve(Path(name)) as server:
        sizes = random.integers(20, 400, COUNT)
        texts = (random.integers(0, 50_000, size) for size in sizes)
        write_documents(f"{name}/a", texts, vocab_size=50_000)  # type: ignore[arg-type]
        local, megatron = FileDocuments(f"{name}/a"), IndexedDataset(f"{name}/a")
        remote = FileDocuments(f"{server.url}/a", remote=Remote(cache=f"{name}/cache"))
        order, lengths = random.permutation(COUNT).tolist(), local.lengths.tolist()
        cold = per_document(lambda: read_all(remote, order, lengths), time.perf_counter)
        print(f"ours over HTTP, cold: {cold:.2f} us by the clock")

        def get() -> None:
            for k in order:
                megatron.get(k, 0, lengths[k])

        def get_wide() -> None:
            for k in order:
                megatron.get(k, 0, lengths[k]).astype(np.int64)

        kinds: dict[str, Callable[[], None]] = {
            "ours": lambda: read_all(local, order, lengths),
            "IndexedDataset.get": get,
            "IndexedDataset.get and int64, as ours returns": get_wide,
            "ours over HTTP, warm": lambda: read_all(remote, order, lengths),
        }
        times = [
            {kind: per_document(action, time.process_time) for kind, action in kinds.items()}
            for _ in range(rounds)
        ]
        best = {kind: min(round_[kind] for round_ in times) for kind in kinds}
        for kind, value in best.items():
            print(
                f"{kind}: {value:.2f} us of processor time, {value / best['ours']:.2f} times ours"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
