"""Is a parent of the studies good enough that cutting it is felt?

    python tests/benchmarks/parents.py RUN RUN RUN

The runs are of one experiment with three seeds or more:

    hybrid-train train experiment=parent_hybrid train.seed=1 run_dir=runs/parent_hybrid_1

Of each, a quarter of the neurons of every MLP, expert and shared expert is set to zero, those whose
weights (a row of the first matrix, a column of the second) have the smallest norm. Prints the loss
on held-out rows before and after, nats per token, and ends with 1 if the rise of any seed is less
than five times the deviation of the losses over the seeds.
"""

import argparse
import logging
import re
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from hybrid_train.config import frozen
from hybrid_train.data.batch import Batch
from hybrid_train.data.run_data import open_data
from hybrid_train.planning.phases import lay_out
from hybrid_train.runtime.start import process
from hybrid_train.schema.train import TrainJob

SHARE = 0.25
DEVIATIONS = 5.0
FIRST = re.compile(r"(.*\.)?linear_fc1(\.weight\d*)")


def cut(model: nn.Module, share: float) -> int:
    """Set the neurons of smallest norm to zero; return how many.

    The share is of the neurons of each pair of matrices, [neurons, inputs] and [outputs, neurons].
    """
    parameters = dict(model.named_parameters())
    zeroed = 0
    for name, first in parameters.items():
        if not (found := FIRST.fullmatch(name)):
            continue
        second = parameters[f"{found[1] or ''}linear_fc2{found[2]}"]
        zeroed += cut_pair(first.data, second.data, share)
    return zeroed


def cut_pair(first: Tensor, second: Tensor, share: float) -> int:
    """Cut one pair; no bias, so that a neuron whose weights are zero says nothing."""
    norms = first.square().sum(dim=1) + second.square().sum(dim=0)
    smallest = norms.argsort()[: round(share * len(norms))]
    first[smallest] = 0
    second[:, smallest] = 0
    return len(smallest)


def held_out(job: TrainJob) -> Iterator[Batch]:
    """Yield the rows that the run itself was validated on."""
    phase_spans = lay_out(job)
    data = open_data(job.data, phase_spans, barrier=lambda: None, is_main=True)
    validation = data.validation(phase_spans[-1], data_rank=0, data_size=1)
    assert validation is not None, "the run has no validation data"
    yield from validation


@torch.no_grad()
def loss(model: nn.Module, batches: list[Batch], vocab_size: int) -> float:
    """Return the mean cross-entropy, nats per token."""
    from hybrid_train.hf.verify import our_logits  # needs the process

    total, count = 0.0, 0.0
    for batch in batches:
        logits = our_logits(model, batch.tokens, vocab_size).flatten(0, 1).cpu()
        losses = nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        weights = batch.loss_weights.flatten()
        total += float((losses * weights).sum())
        count += float(weights.sum())
    return total / count


def before_and_after(run_dir: Path) -> tuple[float, float]:
    job = frozen.load(run_dir)
    with process(job.runtime, job.train.seed):
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            loaded = load_model(str(run_dir), job.runtime)
            model, vocab_size = loaded.model.eval(), loaded.job.model.vocab_size
            batches = list(held_out(job))
            before = loss(model, batches, vocab_size)
            zeroed = cut(model, SHARE)
            after = loss(model, batches, vocab_size)
        finally:
            destroy_groups()
    print(f"{run_dir}: loss {before:.4f}, with {zeroed} neurons at zero {after:.4f}", flush=True)
    return before, after


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description="compare a parent with itself cut by a quarter")
    parser.add_argument("runs", nargs="+", type=Path)
    found = [before_and_after(run) for run in parser.parse_args().runs]
    rises = [after - before for before, after in found]
    if len(found) < 3:
        print(f"rises {shown(rises)}; a deviation needs three seeds")
        return 1
    deviation = statistics.stdev(before for before, _ in found)
    print(
        f"rises {shown(rises)}, the smallest is {min(rises) / deviation:.1f} deviations over seeds "
        f"({deviation:.4f})"
    )
    return 0 if min(rises) >= DEVIATIONS * deviation else 1


def shown(rises: list[float]) -> str:
    return ", ".join(f"{rise:.4f}" for rise in rises)


if __name__ == "__main__":
    sys.exit(main())
