"""What is minimised: the protocol between the step and every training method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import BatchSource
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import MAIN
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.training.network import Network

# output of the model -> (weighted loss sum, valid tokens, report): Megatron's contract for losses
# that are divided once for the whole step. What divides is the first of the totals, a float; the
# valid tokens are core's own count in whole numbers, which nothing reads. The report has `sums` of
# the terms, [terms], and `rows`, the sum of the first term in each row of the microbatch, [B].
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


class Objective(Protocol):
    """A loss over microbatches whose terms are normalised over the whole step.

    An implementation derives from this class; it is called with its settings and a `Given`.
    """

    names: tuple[str, ...]  # of the terms, first the one that is reported as the loss

    @property
    def turns(self) -> Sequence["Turn"]:
        """The updates of a step, in their order; one of one network unless overridden."""
        return (Turn(self),)

    def batches(self, usual: BatchSource) -> BatchSource:
        """Return what the steps of a phase are taken on; called as it begins.

        Args:
            usual: the data of the run. An objective that makes batches up, or makes others of
                these, returns a source of its own; what that keeps is saved, and given back to the
                source of the next phase or of a resumed run.
        """
        return usual

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Run ahead of all turns, as a teacher does; return the microbatches with what it adds.

        Args:
            batches: this process's part of the microbatches of the step.
        """
        return list(batches)

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Sum the weights of each term in this rank's microbatches, [terms].

        Each term is divided by its own sum over all ranks, the gradient by the first.
        """
        ...

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        """Run the model on one microbatch; `totals` are the counts summed over all ranks."""
        ...


@dataclass(frozen=True)
class Given:
    """What an objective is built with beside its own settings.

    Attributes:
        networks: those that are trained, by name; made of the models that the settings list.
        groups: processes of the layout; the run builds another objective for another layout.
        model: the section of the run.
        run_dir: its folder, with tokenizer and record of the data; a job without one has none.
        load: run folder or checkpoint, format (None: that of its weights) -> its network on this
            layout, frozen: a teacher.
    """

    networks: Mapping[str, Network]
    groups: ProcessGroups
    model: Model
    run_dir: Path
    load: Callable[[str, GemmFormat | None], Network]


@dataclass(frozen=True, eq=False)
class Turn:
    """One update of one network.

    Attributes:
        objective: the loss of this update; its own turns are not asked for.
        network: name of the network whose optimizer takes it. Gradients flow through the others,
            and none stays in them.
    """

    objective: Objective
    network: str = MAIN
