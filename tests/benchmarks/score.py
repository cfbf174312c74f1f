"""Log-probabilities of texts: ours in packed rows against transformers on padded batches, one run.

    python tests/benchmarks/score.py RUN [--texts 200] [--rounds 3] [--threads 1]

RUN is a run folder; it is exported, and transformers loads the export. The texts are random tokens,
20 to 300 of them. Both score all tokens but the first, in float32, in turn; transformers at the
best of several batch sizes, its texts sorted by length and padded on the right. Printed are tokens
a second of processor time, which other work on the machine disturbs least (best round of each),
their ratio, and the largest difference of a log-probability.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_train.hf.write import export_checkpoint
from hybrid_train.runtime.start import process
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.runtime import Device, Kernels, Runtime

SHORTEST, LONGEST = 20, 300
BATCHES = (1, 2, 4, 8, 16)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runtime = Runtime(device=Device.cpu, kernels=Kernels.plain, threads=options.threads)
    with tempfile.TemporaryDirectory() as folder, process(runtime, seed=0):
        export_checkpoint(options.run, Path(folder) / "hf", None, 2**40)
        measure(options, runtime, Path(folder) / "hf")


def measure(options: argparse.Namespace, runtime: Runtime, exported: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hybrid_train.generation.scoring import Rows, Text, score
    from hybrid_train.jobs.networks import load_model

    loaded = load_model(str(options.run), runtime, format=GemmFormat.fp32)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    texts = some_texts(options.texts, loaded.network.vocab_size)
    scored = sum(map(len, texts)) - len(texts)
    print(
        f"{options.run.name}: {sum(p.numel() for p in theirs.parameters()):,} parameters; "
        f"{len(texts)} texts, {scored} scored tokens, {options.threads} thread(s)"
    )
    given = [Text(text) for text in texts]
    wanted = [Rows(), Rows(2048, 8192)]
    ways: dict[str, Callable[[], list[Tensor]]] = {
        f"ours, rows of {rows.length}, {rows.tokens} a microbatch": (
            lambda rows=rows: [one.log_probs for one in score(loaded.network, given, rows=rows)]
        )
        for rows in wanted
    }
    for batch in BATCHES:
        ways[f"transformers, batch {batch}"] = lambda batch=batch: padded(theirs, texts, batch)
    report(ways, scored, options.rounds, default=next(iter(ways)))


def report(
    ways: dict[str, Callable[[], list[Tensor]]], scored: int, rounds: int, default: str
) -> None:
    """Time all ways in turn; print the best round of each, the ratio, the differences."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            values = way()
            seconds[name].append(time.process_time() - start)
            found[name] = torch.cat(values)
    rates = {name: scored / min(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        largest = float((found[name] - found[default]).abs().max())
        print(f"{name:44} {rate:8.0f} tokens/s, largest difference {largest:.1e} nats")
    best = max(rate for name, rate in rates.items() if name.startswith("transformers"))
    print(f"ratio of our default to transformers at its best: {rates[default] / best:.2f}")


def some_texts(number: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (number,), generator=generator).tolist()
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def padded(model: Any, texts: list[list[int]], batch: int) -> list[Tensor]:
    """Score with transformers; what is padded stands behind the texts, so no mask is needed."""
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        longest = len(texts[numbers[0]])
        tokens = torch.tensor([texts[n] + [0] * (longest - len(texts[n])) for n in numbers])
        logs = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        picked = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        found |= {n: row[: len(texts[n]) - 1] for n, row in zip(numbers, picked, strict=True)}
    return [found[number] for number in range(len(texts))]


if __name__ == "__main__":
    sys.exit(main())
