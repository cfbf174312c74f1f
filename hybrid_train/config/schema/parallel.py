"""The parallel layout: how many ways each axis of the work is split."""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.config.problems import Problem, at_least


@dataclass(kw_only=True)
class Parallel:
    """Degrees of parallelism. What is left of the processes is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline stage (interleaved schedule)
    expert: int = 1
    expert_tensor: int | None = None  # None: the same as tensor
    context: int = 1
    sequence: bool | None = None  # split norms along the sequence too; None: when tensor > 1
    distributed_optimizer: bool = True  # split the optimizer state over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass still runs
    overlap_param_gather: bool = False  # gather parameters while the forward pass already runs

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from at_least(
            1,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            context=self.context,
        )
