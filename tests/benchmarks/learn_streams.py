"""How near a small hybrid model comes to the lowest loss of each synthetic stream.

    python tests/benchmarks/learn_streams.py [--steps 1000] [--kinds copy sums]

Prints, every tenth of the steps, the loss on held-out documents beside the lowest loss possible, in
nats per token. Rows hold whole documents only, so each token is predicted from all of its document.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402

from hybrid_train.data.batch import Batch  # noqa: E402
from hybrid_train.data.documents import Documents  # noqa: E402
from hybrid_train.data.sources import open_source, own_vocabulary  # noqa: E402
from hybrid_train.data.synthetic import best_loss  # noqa: E402
from hybrid_train.schema.data import (  # noqa: E402
    BracketStream,
    CopyStream,
    RecallStream,
    Source,
    Split,
    SumStream,
    Synthetic,
)
from hybrid_train.schema.optimizer import Cosine  # noqa: E402
from tests.tiny import alone, batch_of, tiny_engine, tiny_job  # noqa: E402

PATTERN, LENGTH, ROWS = "M*-M*-", 64, 32
STREAMS: list[Synthetic] = [
    CopyStream(symbols=8, min_items=4, max_items=8),
    RecallStream(keys=8, values=8, min_items=2, max_items=4),
    BracketStream(types=3, min_items=4, max_items=12),
    SumStream(modulus=7, terms=2, min_items=4, max_items=12),
]


def batches(documents: Documents, end: int) -> Iterator[Batch]:
    """Rows of whole documents; what a row has left counts for nothing."""
    lengths, number, rows = documents.lengths.tolist(), 0, []
    while True:
        row = [end]
        while len(row) + lengths[number] <= LENGTH + 1:
            row += documents.read(number, 0, lengths[number]).tolist()
            number = (number + 1) % len(lengths)
        rows.append(row)
        if len(rows) == ROWS:
            tokens = torch.full((ROWS, LENGTH + 1), end)
            mask = torch.zeros(ROWS, LENGTH)
            for place, full in enumerate(rows):
                tokens[place, : len(full)] = torch.tensor(full)
                mask[place, : len(full) - 1] = 1
            yield batch_of(tokens, mask)
            rows = []


def learn(config: Synthetic, steps: int, groups: Any) -> None:
    source = Source(**{config.kind: config})
    vocabulary = own_vocabulary([source])
    assert vocabulary is not None
    (train,), (held_out,) = (open_source(source, split, vocabulary) for split in Split)
    budget = steps * ROWS * LENGTH
    job = tiny_job(PATTERN, schedule=Cosine(peak_lr=5e-3, warmup_tokens=str(budget // 20)))
    job.train.tokens, job.train.sequence_length = str(budget), LENGTH
    job.train.microbatch = job.train.global_batch = ROWS
    job.model.hidden_size = 64
    engine = tiny_engine(job, groups)
    rows, start = batches(train, vocabulary.end_of_document), time.monotonic()
    for step in range(1, steps + 1):
        engine.step(rows, tokens_seen=(step - 1) * ROWS * LENGTH)
        if step % max(1, steps // 10) == 0:
            held = batches(held_out, vocabulary.end_of_document)
            found = engine.evaluate([next(held) for _ in range(8)])
            print(
                f"{config.kind}: step {step}, held-out {next(iter(found.values())):.4f}, "
                f"lowest {best_loss(config):.4f} nats/token, {time.monotonic() - start:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kinds", nargs="*", default=[config.kind for config in STREAMS])
    arguments = parser.parse_args()
    with alone() as groups:
        for config in STREAMS:
            if config.kind in arguments.kinds:
                learn(config, arguments.steps, groups)


if __name__ == "__main__":
    main()
