"""How far a student's next-token distribution is from its teachers': an objective.

Dimensions: B batch, S sequence, D prediction depths, K values of a token.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from hybrid_train.data.batch import Batch
from hybrid_train.distillation.hidden_states import HiddenStates, TeacherStates
from hybrid_train.distillation.targets import StoredTeacher, open_targets
from hybrid_train.distillation.teacher_record import read_record, weighed
from hybrid_train.distillation.teachers import Teacher
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.ops.divergence import Distillation
from hybrid_train.ops.logits import CrossEntropy, HeadPart, Term
from hybrid_train.runtime import ranks
from hybrid_train.schema import objective as schema
from hybrid_train.schema.objective import MtpTarget
from hybrid_train.training.next_token import Depths
from hybrid_train.training.objective import Given, LossFunction, Objective

_HIDDEN = "hidden_loss"
_HIDDEN_WEIGHT = "hidden_weight"  # in the state
_OF_A_TOKEN = ("loss", "divergence", "cross_entropy", "agreement")  # what the main head says of it


class Distill(Objective):
    """Mean divergence from teachers, with a share of cross-entropy, and the losses of MTP depths.

    Agreement is for a validation: in training nobody computes it, and its weight is 0.

    Sources: Minitron, arXiv:2407.14679, section 3; DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """

    def __init__(self, settings: schema.Distill, given: Given) -> None:
        self._settings = settings
        self._student, self._shared = given.networks[schema.MAIN], False
        self._teachers = _load_teachers(settings, given)
        self._depths = Depths(given, settings.mtp_loss_scale)
        if not settings.trains_mtp:
            self._depths.number = 0
        self._hidden = self._draw_hidden_states()
        of_hidden = () if self._hidden is None else (_HIDDEN,)
        self.names = (*_OF_A_TOKEN, *self._depths.names, *of_hidden)

    def _draw_hidden_states(self) -> HiddenStates | None:
        """Listen to layers of the first teacher and of the student, if any are named."""
        settings = self._settings.hidden
        if not settings.layers:
            return None
        teacher = self._teachers[0]
        assert isinstance(teacher, Teacher), "stored targets have no hidden states between layers"
        teacher.states = states = TeacherStates(teacher.network, settings)
        return ranks.all_or_none(lambda: HiddenStates(settings, self._student, states))

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        if not self._shared:  # not before: the student has got its weights by now
            for teacher in self._teachers:
                if isinstance(teacher, Teacher):
                    teacher.share_with(self._student)
            self._shared = True
        found = list(batches)
        for teacher in self._teachers:
            found = teacher.run_ahead(found, with_mtp=self._mtp_from_teacher)
        return found

    def count(self, batches: Sequence[Batch]) -> Tensor:
        by_depth = torch.stack([self._depths.masks(one).sum(dim=(1, 2)) for one in batches]).sum(0)
        main = by_depth[:1].repeat(len(_OF_A_TOKEN))
        if torch.is_grad_enabled():
            main[-1] = 0.0
        of_hidden = by_depth[:0] if self._hidden is None else by_depth[:1]
        return torch.cat([main, by_depth[1:], of_hidden])

    def forward(self, model: Module, batch: Batch, totals: Tensor) -> tuple[Tensor, LossFunction]:
        with contextlib.nullcontext() if self._hidden is None else self._hidden.seeing(batch):
            output = model(
                batch.tokens,
                batch.position_ids if self._depths.number else None,
                sequence_index=batch.sequence_index,
                padding=batch.padding,
                read=lambda outputs: self._read(outputs, batch, totals),
            )
        return output, self._report

    def recorded(self) -> Tensor | None:
        if self._hidden is None:
            return None
        of_hidden = self._hidden.take()
        return torch.cat([of_hidden.new_zeros(len(self.names) - 1), of_hidden[None]])

    def took(self, metrics: Mapping[str, float]) -> None:
        if self._hidden is not None:
            self._hidden.balance(metrics["divergence"], metrics[_HIDDEN])

    def state_dict(self) -> dict[str, float]:
        return {} if self._hidden is None else {_HIDDEN_WEIGHT: self._hidden.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if self._hidden is not None:
            self._hidden.weight = state.get(_HIDDEN_WEIGHT, self._hidden.weight)

    @property
    def _mtp_from_teacher(self) -> bool:
        return self._depths.number > 0 and self._settings.mtp is MtpTarget.divergence

    def _read(
        self, outputs: Outputs, batch: Batch, totals: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum up the losses so that division by the main count normalises every depth.

        Returns:
            The sum; values of the main head, [B, S, K]; losses of the MTP depths, [D, B, S]; masks
            of all, [1 + D, B, S].
        """
        depths = totals[len(_OF_A_TOKEN) : len(_OF_A_TOKEN) + self._depths.number]
        by_depth = torch.cat([totals[:1], depths])
        factors, masks = self._depths.factors(by_depth), self._depths.masks(batch)
        labels = self._depths(batch.labels, batch)
        found = []
        for number, hidden in enumerate((outputs.hidden, *outputs.mtp_hidden)):
            term = self._term(batch, labels[number], outputs.head.part, number)
            weights = factors[number] * masks[number]
            found.append(outputs.head.weighted_sum(hidden, term, weights))
        sums, values = zip(*found, strict=True)
        of_depths = [one[..., 0] if one.dim() > masks[0].dim() else one for one in values[1:]]
        losses = torch.stack(of_depths) if of_depths else masks[1:]
        return torch.stack(sums).sum(), values[0], losses, masks

    def _report(self, output: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        total, values, losses, masks = output  # as read
        weighed = values * masks[0][..., None]
        sums = weighed.new_zeros(len(self.names))
        sums[: values.shape[-1]] = weighed.sum(dim=(0, 1))
        of_depths = (losses * masks[1:]).sum(dim=(1, 2))
        sums[len(_OF_A_TOKEN) : len(_OF_A_TOKEN) + len(of_depths)] = of_depths
        return total, masks[0].sum().int(), {"sums": sums, "rows": weighed[..., 0].sum(dim=1)}

    def _term(self, batch: Batch, labels: Tensor, head: HeadPart, number: int) -> Term:
        """Return the term of the main head, 0, or of an MTP depth, from 1."""
        flat = labels.t().flatten()  # sequence before batch, as hidden states
        if number and not self._mtp_from_teacher:
            return CrossEntropy(flat)
        settings = self._settings
        depth = number - 1 if number else None
        return Distillation(
            [(one.weight, one.reference(batch, head, depth)) for one in self._teachers],
            flat,
            settings.temperature,
            settings.reverse_share,
            settings.cross_entropy_share,
            settings.top_k,
            agreement=not number and not torch.is_grad_enabled(),
        )


def _load_teachers(settings: schema.Distill, given: Given) -> Sequence[Teacher | StoredTeacher]:
    """Load the teachers: those that the run has recorded, or as they are named where it has not."""
    if settings.targets is not None:
        return [StoredTeacher(open_targets(settings.targets), given.groups)]
    recorded = ranks.broadcast_from_main(lambda: read_record(given.run_dir))
    places = None if recorded is None else [str(one.found.path) for one in recorded]
    found = []
    for number, one in enumerate(weighed(settings)):
        place = one.checkpoint if places is None else places[number]
        network = given.load(place, settings.teacher_format)
        found.append(Teacher(one.checkpoint, one.weight, network, number))
    return found
