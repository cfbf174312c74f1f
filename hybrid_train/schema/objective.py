"""What is minimised.

An objective of a user's own is a dataclass like those below, in a package of theirs.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from omegaconf import MISSING

from hybrid_train.schema.extension import Extension
from hybrid_train.schema.limits import Factor, FileName, Range, Share, Size, Weight
from hybrid_train.schema.model import Model
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import Problem

MAIN = "model"  # the network of a step that trains no other
SELF = "self"  # the teacher that is what a student starts from


@dataclass(kw_only=True)
class ObjectiveSettings(Extension):
    """What the settings of every objective have: routers add their balance loss to any loss.

    The implementation is called with the settings and a `Given` (`training/objective.py`).
    """

    moe_aux_loss_scale: Factor = 1e-4  # weight of the sequence-wise balance loss of the experts

    def models(self, model: Model) -> dict[str, Model]:
        """Return the models that are trained, by the names of their networks.

        Args:
            model: the section of the run.
        """
        return {MAIN: model}


@dataclass(kw_only=True)
class NextToken(ObjectiveSettings):
    """Cross-entropy of the next token, plus the weighted MTP and load-balance terms."""

    implementation: ClassVar[str] = "hybrid_train.training.next_token:NextToken"
    kind: str = "next_token"
    mtp_loss_scale: Factor = 0.1  # weight of the mean of the MTP losses


class MtpTarget(enum.Enum):
    """What the MTP depths of a student learn."""

    divergence = "divergence"  # the distribution of the teacher's own depth
    cross_entropy = "cross_entropy"  # the label, as in pretraining
    off = "off"  # nothing: no gradient reaches the MTP blocks


@dataclass(kw_only=True)
class WeighedTeacher:
    """One of several teachers."""

    checkpoint: FileName = MISSING  # run folder or one checkpoint
    weight: Weight = 1.0  # of its divergence, relative to those of the others


@dataclass(kw_only=True)
class Distill(ObjectiveSettings):
    """How far the student's distribution is from a teacher's, in place of the labels.

    Sources: Minitron, arXiv:2407.14679, section 3 (the losses, and forward KL of the logits alone
    as the best of them); Hinton et al., arXiv:1503.02531 (temperature, and its square as factor).
    """

    implementation: ClassVar[str] = "hybrid_train.distillation.distill:Distill"
    kind: str = "distill"
    # Run folder or checkpoint; "self": the weights that the run starts from (checkpoint.load).
    teacher: FileName | None = None
    teachers: list[WeighedTeacher] = field(default_factory=list)  # several, in place of one
    targets: FileName | None = None  # what distill_targets wrote, in place of a teacher
    teacher_format: GemmFormat | None = None  # null: that of the teacher's own weights
    reverse_share: Share = 0.0  # of KL(student || teacher); the rest is KL(teacher || student)
    temperature: Annotated[float, Range(0.01, 100)] = 1.0  # divides both logits of a divergence
    cross_entropy_share: Share = 0.0  # of the labels in the loss; the rest is the divergence
    top_k: Size | None = None  # tokens of the teacher, and one entry for all others; null: all
    mtp: MtpTarget = MtpTarget.divergence
    mtp_loss_scale: Factor = 0.1  # weight of the mean of the MTP losses

    def problems(self) -> Iterator[Problem]:
        """Check what the settings say together."""
        named = [one for one in ("teacher", "teachers", "targets") if getattr(self, one)]
        if not named:
            rule = "must be a run folder, a checkpoint, or self; teachers or targets may replace it"
            yield Problem("teacher", self.teacher, rule)
        if len(named) > 1:
            rule = f"must be left out beside {' and '.join(named[:-1])}: one of them says the aim"
            yield Problem(named[-1], getattr(self, named[-1]), rule, None)
        if self.teachers and not any(one.weight for one in self.teachers):
            yield Problem("teachers.0.weight", 0.0, "must be above 0 for one teacher or more", 1.0)


OBJECTIVES: dict[str, type[ObjectiveSettings]] = {"next_token": NextToken, "distill": Distill}
