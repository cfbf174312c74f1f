"""What scoring costs: forward passes that are listened to, against the same passes alone.

    python tests/benchmarks/importance.py [--model parent_hybrid] [--rounds 7] [--threads 1]

Both take turns, so that a busy machine slows both alike; printed is the processor time of scored
passes as a multiple of plain ones, MTP blocks in both: the median of the rounds, lowest and
highest. Last comes what the layers cost that are run without each expert.
"""

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH, ROWS, MICROBATCH, VOCAB = 512, 4, 2, 1024


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="parent_hybrid")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    with process(Runtime(device=Device.cpu, threads=options.threads), 0):
        compare(options.model, options.rounds)


def compare(name: str, rounds: int) -> None:
    """Let plain and scored passes take turns."""
    from hybrid_train.schema.importance import ExpertMetric, ImportanceJob

    passes, model = passes_of(name)

    def job(metric: ExpertMetric) -> ImportanceJob:
        return ImportanceJob(checkpoint="", output="", experts=metric)

    ways: dict[str, Callable[[], None]] = {
        "plain": lambda: read(passes),
        "scored": lambda: score(passes, model, job(ExpertMetric.output)),
        "each expert left out": lambda: score(passes, model, job(ExpertMetric.without)),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first one warms up
        for way, run in ways.items():
            start = time.process_time()
            run()
            if number:
                taken[way].append(time.process_time() - start)
    plain = statistics.median(taken["plain"])
    print(f"{name}, {ROWS} rows of {LENGTH} tokens: plain {plain:.2f} s of processor time")
    for way in list(ways)[1:]:
        ratios = [own / bare for own, bare in zip(taken[way], taken["plain"], strict=True)]
        print(f"{way}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def passes_of(name: str) -> tuple[Any, Any]:
    """Passes of a model with its first weights over random tokens."""
    from hybrid_train.compression.passes import Passes
    from hybrid_train.config.compose import compose
    from hybrid_train.data.batch import Row
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model
    from hybrid_train.schema.train import TrainJob
    from hybrid_train.training.network import Network, Routing

    job = compose("train", ["experiment=tiny_cpu", f"model={name}", "run_dir=unused"])
    assert isinstance(job, TrainJob)
    groups = build_groups(job.parallel, 600)
    built = build_model(job, groups, VOCAB, on_gpu=False)
    device = torch.device("cpu")
    network = Network(list(built.chunks), groups, device, Routing((), 0), built.balance_losses)
    network.freeze()
    tokens = np.random.default_rng(0).integers(VOCAB, size=(ROWS, LENGTH + 1))
    weights, places = np.ones(LENGTH, np.float32), np.arange(LENGTH)
    rows = [Row(row[:-1], row[1:], weights, places) for row in tokens]
    return Passes(network, rows.__getitem__, MICROBATCH), job.model


def read(passes: Any) -> None:
    """Run all rows."""
    for batches in passes.groups(ROWS):
        passes.run(batches, lambda out, _: (out.hidden,), with_mtp=True)


def score(passes: Any, model: Any, job: Any) -> None:
    """Run all rows, and score what they show."""
    from hybrid_train.compression.activations import Activations

    heard = Activations(passes.network, model, job)
    with heard.listening():
        for batches in passes.groups(ROWS):
            passes.run(batches, lambda out, _: (out.hidden,), with_mtp=True, seeing=heard.see)
            heard.close()
    heard.collect()


if __name__ == "__main__":
    main()
