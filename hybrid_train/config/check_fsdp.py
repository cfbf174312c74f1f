"""Where Megatron-FSDP does not run or does not agree with one process, and why.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

from collections.abc import Iterator

from hybrid_train.schema.parallel import Recompute
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.train import TrainJob


def fsdp_runs(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse FSDP where it does not run, or computes something else."""
    plan = job.parallel
    if plan.fsdp and plan.pipeline > 1:
        # Its mesh of ranks has the axes data, expert and tensor (mcore_fsdp_adapter.py 561), and
        # would leave out those of other stages.
        rule = "needs parallel.pipeline=1: Megatron-FSDP knows no pipeline stages"
        yield Problem("parallel.fsdp", True, rule, "false")
    elif plan.fsdp and not plan.distributed_optimizer:
        rule = "splits the optimizer state too: needs parallel.distributed_optimizer=true"
        yield Problem("parallel.fsdp", True, rule, "false")
    elif plan.fsdp and plan.recompute is not Recompute.none:
        # Found by the parity suite: gradients of experts of an MTP block are wrong.
        rule = "needs parallel.recompute=none: gradients of experts come out wrong otherwise"
        yield Problem("parallel.fsdp", True, rule, "false")
