"""The root of a training run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hybrid_train.schema.checkpoint import Checkpoint, Recovery
from hybrid_train.schema.data import Data, blend_problems
from hybrid_train.schema.evaluation import Evaluation
from hybrid_train.schema.gpu import Gpu
from hybrid_train.schema.limits import (
    Batch,
    Count,
    CountOrNone,
    FileName,
    Length,
    Name,
    Place,
    Processes,
    Rate,
    Seed,
    TokenCount,
    TokenCountOrNone,
    Weight,
)
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import NextToken, ObjectiveSettings
from hybrid_train.schema.optimizer import AdamW, Schedule
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision, PrecisionRule
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.tracking import Profile, Tracking


@dataclass(kw_only=True)
class BatchRamp:
    """A global batch that grows to its size in stages of equal length; the end is global_batch."""

    tokens: TokenCountOrNone = "0"  # length of all stages; 0: no ramp
    start_batch: Batch = 1  # sequences of the first steps over all ranks
    increment: Batch = 1  # sequences that each stage adds


@dataclass(kw_only=True)
class Phase:
    """A part of the run with settings of its own; what is left out is as in the phase before."""

    name: Name = MISSING
    start: Place = "0"  # "80%" of train.tokens, or a number of tokens, "20T"
    blend: dict[str, Weight] = field(default_factory=dict)
    sequence_length: Length | None = None
    microbatch: Batch | None = None
    global_batch: Batch | None = None
    tensor: Processes | None = None
    pipeline: Processes | None = None
    context: Processes | None = None
    expert: Processes | None = None
    constant_lr: Rate | None = None  # in place of the schedule, which stands still meanwhile
    precision_exceptions: list[PrecisionRule] | None = None  # they come before those of the run

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from blend_problems("blend", self.blend)


@dataclass(kw_only=True)
class Train:
    """Length and batch of the run. Batches are counted in sequences."""

    tokens: TokenCount = MISSING  # "2M"; the run ends at the first step that reaches this
    sequence_length: Length = MISSING
    microbatch: Batch = 1  # sequences of one forward pass of one data-parallel rank
    global_batch: Batch = MISSING  # sequences of one step over all ranks
    batch_ramp: BatchRamp = field(default_factory=BatchRamp)
    phases: list[Phase] = field(default_factory=list)  # empty: one phase from start to end
    seed: Seed = 1234
    validation_interval: CountOrNone | None = (
        None  # steps; 0: at the end; null: 100, 1/8 if shorter
    )
    validation_batches: Count = 20  # global batches of one validation
    validate_start: bool = False  # also before the first step: what the first weights are worth


@dataclass(kw_only=True)
class TrainJob:
    """Everything a training run needs to know."""

    run_dir: FileName = MISSING
    train: Train = field(default_factory=Train)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    data: Data = field(default_factory=Data)
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    objective: ObjectiveSettings = field(default_factory=NextToken)
    edits: list[Any] = field(default_factory=list)  # of the model: mask, or by import path
    hooks: list[Any] = field(default_factory=list)  # of the loop, by import path
    row_transforms: list[Any] = field(default_factory=list)  # of the data, by import path
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    recovery: Recovery = field(default_factory=Recovery)
    tracking: Tracking = field(default_factory=Tracking)
    runtime: Runtime = field(default_factory=Runtime)
    gpu: Gpu = field(default_factory=Gpu)
    profile: Profile = field(default_factory=Profile)
    evaluate: Evaluation = field(default_factory=Evaluation)
