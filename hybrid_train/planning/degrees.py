"""Sizes that follow from the degrees of parallelism: ranks, microbatches, splits, padding."""

import math

from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import TrainJob


def expert_tensor(parallel: Parallel) -> int:
    """Return how many ways one expert is split."""
    return parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor


def splits_sequence(parallel: Parallel) -> bool:
    """Tell whether norms are split along the sequence too."""
    return parallel.tensor > 1 if parallel.sequence is None else parallel.sequence


def data_parallel(parallel: Parallel, processes: int) -> int:
    """Return how many groups of processes read different sequences."""
    return processes // (parallel.tensor * parallel.pipeline * parallel.context)


def expert_data_parallel(parallel: Parallel, processes: int) -> int:
    """Return how many processes hold the same routed experts."""
    return processes // (expert_tensor(parallel) * parallel.expert * parallel.pipeline)


def processes_unit(parallel: Parallel) -> int:
    """Return the number whose multiples of processes the degrees can split."""
    dense = parallel.tensor * parallel.pipeline * parallel.context
    sparse = expert_tensor(parallel) * parallel.expert * parallel.pipeline
    return math.lcm(dense, sparse)


def num_microbatches(job: TrainJob, processes: int) -> int:
    """Return the microbatches of one step of one data-parallel rank."""
    ranks = data_parallel(job.parallel, processes)
    return job.train.global_batch // (ranks * job.train.microbatch)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Round up, so that the rows split evenly and GEMMs are fast."""
    return math.ceil(vocab_size / multiple) * multiple


def nearest_multiple(value: int, unit: int) -> int:
    """Return the multiple of a unit that is nearest to a value, at least the unit itself."""
    return max(1, round(value / unit)) * unit
