"""Forward passes of a frozen network over numbered rows, under any layout.

Data-parallel ranks share the rows; a rank that has fewer than another fills up with rows of which
nothing counts, since experts on another one need its passes.

Dimensions: B rows of a microbatch, S tokens of a row on this context rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid_train.data.batch import Batch, Row, stack
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.runtime import heartbeat
from hybrid_train.training.network import Network

_COUNTED = "counted"  # token_extras: whether a token counts, [B, S]
Read = Callable[[Outputs, Batch], Any]  # what a last stage makes of a microbatch: tensors


def counted_tokens(batch: Batch) -> Tensor:
    """Return which tokens count, [S, B], bool: none of padding, nor of a row that fills up."""
    return batch.token_extras[_COUNTED].t()


@dataclass(frozen=True)
class Passes:
    """Runs rows through a network; every process of the layout makes the same calls.

    Attributes:
        network: frozen, on its layout.
        read: reads a row by its number.
        microbatch: rows of a pass of one data-parallel rank.
    """

    network: Network
    read: Callable[[int], Row]
    microbatch: int

    def groups(self, rows: int) -> Iterator[list[Batch]]:
        """Yield this process's part of the first `rows` rows, some microbatches at a time."""
        network = self.network
        rank, size = network.groups.dp.rank(), network.groups.dp.size()
        at_once = self.microbatch * network.passes_multiple * network.groups.pp.size()
        for first in range(0, rows, at_once * size):
            here = range(first, min(first + at_once * size, rows))
            own = [_marked(self.read(number)) for number in here[rank::size]]
            # A last group may be short; schedules take a multiple of what it is made of.
            unit = self.microbatch * network.passes_multiple
            wanted = -(-len(here) // (size * unit)) * unit
            fill = _marked(own[0] if own else self.read(0), counts=False)
            own += [fill] * (wanted - len(own))
            batches = [
                stack(own[start : start + self.microbatch])
                for start in range(0, len(own), self.microbatch)
            ]
            yield [network.own(batch) for batch in batches]

    def run(
        self,
        batches: Sequence[Batch],
        read: Read,
        *,
        with_mtp: bool = False,
        seeing: Callable[[Batch], None] | None = None,
    ) -> list[Any]:
        """Run microbatches; return what was read of each, on a last stage.

        Args:
            batches: of one group.
            read: makes tensors of the outputs.
            with_mtp: whether MTP blocks run, too.
            seeing: is told which microbatch the next pass is of.
        """

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
            heartbeat.enter(heartbeat.last().part)  # still there
            batch = next(iterator)
            if seeing is not None:
                seeing(batch)
            output = model(
                batch.tokens,
                batch.position_ids if with_mtp else None,
                sequence_index=batch.sequence_index,
                padding=batch.padding,
                read=lambda outputs: read(outputs, batch),
            )
            return output, _report

        rows, length = batches[0].tokens.shape
        with self.network.evaluating():
            reports = run_schedule(
                self.network.chunks,
                forward_step,
                list(batches),
                shape=(rows, length * self.network.groups.cp.size()),
                forward_only=True,
            )
        return [report["read"] for report in reports]


def _marked(row: Row, *, counts: bool = True) -> Row:
    """Say which tokens of a row count."""
    padding = np.zeros(len(row.tokens), dtype=bool) if row.padding is None else row.padding
    counted = ~padding if counts else np.zeros_like(padding)
    row = row if counts else row.without_labels()
    return replace(row, token_extras={**row.token_extras, _COUNTED: counted})


def _report(output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Be Megatron's loss function: no loss, no tokens that divide it, but what was read."""
    none = output[0].new_zeros(())
    return none, none.int(), {"read": output}
