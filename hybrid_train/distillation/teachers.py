"""Teachers: frozen networks on the student's processes that run ahead of it.

A teacher hands over final hidden states, a slot for each microbatch of the step, which only the
last pipeline stage has; its head makes logits of them where the student's makes its own, chunk by
chunk. All microbatches are run before the student's first: Megatron's schedules keep the passes of
one model in an order of their own, in which those of another have no place.

Dimensions: B rows of a microbatch, S places of a row on this context rank, H hidden units of the
teacher, T = S x B tokens, sequence before batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.megatron.hybrid import Head, Hybrid
from hybrid_train.ops.logits import HeadPart
from hybrid_train.ops.reference import Reference, aligned
from hybrid_train.runtime import heartbeat
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network


@dataclass
class Teacher:
    """One of the networks that a student learns from.

    Attributes:
        label: what the command calls it.
        weight: of its divergence; those of all teachers sum to 1.
        network: frozen, under the layout of the student.
        number: of the teacher, from 0; names its slots.
    """

    label: str
    weight: float
    network: Network
    number: int = 0
    _head: HeadPart | None = field(default=None, init=False)

    def run_ahead(self, batches: Sequence[Batch], *, with_mtp: bool) -> list[Batch]:
        """Run all microbatches; every process calls this, also those that get nothing.

        Args:
            batches: this process's part of them.
            with_mtp: whether the hidden states of the MTP depths are wanted, too.

        Returns:
            The microbatches; on the last pipeline stage each with its slot: token_extras
            `teacher_hidden.{number}` and `teacher_mtp_hidden.{number}.{depth}`, [B, S / tp or S,
            H], depths from 0.

        Raises:
            UserError: if a hidden state is not a finite number; on all processes.
        """
        if not batches:
            return []
        rows, length = batches[0].tokens.shape
        with self.network.evaluating():
            reports = run_schedule(
                self.network.chunks,
                lambda iterator, model: _forward(iterator, model, with_mtp=with_mtp),
                list(batches),
                shape=(rows, length * self.network.groups.cp.size()),
                forward_only=True,
            )
        slots: list[Any] = [report["hidden"] for report in reports]
        self._require_finite(slots)
        if not slots:
            return list(batches)
        return [
            replace(batch, token_extras={**batch.token_extras, **self._named(slot)})
            for batch, slot in zip(batches, slots, strict=True)
        ]

    def share_with(self, student: Network) -> None:
        """Let frozen parameters of the student stand for equal ones of one's own: one copy of both.

        Args:
            student: with the weights that it starts from.
        """
        for mine, theirs in zip(self.network.chunks, student.chunks, strict=True):
            own = dict(mine.named_parameters())
            for name, parameter in theirs.module.named_parameters():
                held = own.get(name)
                if held is None or parameter.requires_grad or held.shape != parameter.shape:
                    continue
                if held.dtype == parameter.dtype and torch.equal(held, parameter):
                    held.data = parameter.data

    def reference(self, batch: Batch, student: HeadPart, depth: int | None = None) -> Reference:
        """Return what it makes of a microbatch; tensor ranks call this together.

        Args:
            batch: with its slot.
            student: this rank's part of the student's head.
            depth: MTP depth, from 0; None: the main head.
        """
        if self._head is None:
            self._head = aligned(_last_head(self.network).part, student)
        hidden = batch.token_extras[self._name(depth)].transpose(0, 1)
        whole = replace(self._head, sequence_split=student.sequence_split).gathered(hidden)
        return Reference(whole, self._head)

    def _named(self, slot: Sequence[Tensor]) -> Mapping[str, Tensor]:
        depths = (None, *range(len(slot) - 1))
        return {
            self._name(depth): hidden.transpose(0, 1)
            for depth, hidden in zip(depths, slot, strict=True)
        }

    def _name(self, depth: int | None) -> str:
        if depth is None:
            return f"teacher_hidden.{self.number}"
        return f"teacher_mtp_hidden.{self.number}.{depth}"

    def _require_finite(self, slots: Sequence[Sequence[Tensor]]) -> None:
        """Refuse hidden states that are no numbers, before the student has seen them."""
        found = [hidden.isfinite().all() for slot in slots for hidden in slot]
        wrong = torch.zeros((), device=self.network.device)
        if found:
            wrong += ~torch.stack(found).all()
        dist.all_reduce(wrong)
        if wrong.item():
            error = UserError(
                f"teacher {self.label}: its hidden states are not finite; it has weights that are "
                "not, or numbers that overflow; take an earlier checkpoint of it"
            )
            error.on_all_ranks = True
            raise error


def _forward(iterator: Iterator[Batch], model: Module, *, with_mtp: bool) -> tuple[Any, Any]:
    heartbeat.enter(heartbeat.last().part)  # still there
    batch = next(iterator)
    output = model(
        batch.tokens,
        batch.position_ids if with_mtp else None,
        sequence_index=batch.sequence_index,
        padding=batch.padding,
        read=lambda outputs: (outputs.hidden, *outputs.mtp_hidden),
    )
    return output, _report


def _report(output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Be Megatron's loss function: no loss, no tokens that divide it, but what was made."""
    none = output[0].new_zeros(())
    return none, none.int(), {"hidden": output}


def _last_head(network: Network) -> Head:
    """Return the head of a network; the last pipeline stage has it."""
    chunk = network.chunks[-1]
    assert isinstance(chunk, Hybrid), "a frozen network is not wrapped"
    return chunk.head()
