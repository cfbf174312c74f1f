"""The root of a training run."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.config.problems import Problem, at_least
from hybrid_train.config.schema.checkpoint import Checkpoint
from hybrid_train.config.schema.data import Data, blend_problems
from hybrid_train.config.schema.model import Model
from hybrid_train.config.schema.objective import NextToken
from hybrid_train.config.schema.optimizer import AdamW
from hybrid_train.config.schema.parallel import Parallel
from hybrid_train.config.schema.precision import Precision, PrecisionRule
from hybrid_train.config.schema.profile import Profile
from hybrid_train.config.schema.recovery import Recovery
from hybrid_train.config.schema.runtime import Runtime
from hybrid_train.config.schema.schedule import Schedule
from hybrid_train.config.schema.tracking import Tracking
from hybrid_train.config.units import POSITION_RULE, TOKENS_RULE, is_position, is_tokens


@dataclass(kw_only=True)
class BatchRamp:
    """A global batch that grows to its size in stages of equal length; the end is global_batch."""

    tokens: str = "0"  # length of all stages; 0: no ramp
    start_batch: int = 1  # sequences of the first steps over all ranks
    increment: int = 1  # sequences that each stage adds

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not is_tokens(self.tokens):
            yield Problem("tokens", self.tokens, TOKENS_RULE)
        yield from at_least(1, start_batch=self.start_batch, increment=self.increment)


@dataclass(kw_only=True)
class Phase:
    """A part of the run with settings of its own; what is left out is as in the phase before."""

    name: str = MISSING
    start: str = "0"  # "80%" of train.tokens, or a number of tokens, "20T"
    blend: dict[str, float] = field(default_factory=dict)
    sequence_length: int | None = None
    microbatch: int | None = None
    global_batch: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    context: int | None = None
    expert: int | None = None
    constant_lr: float | None = None  # in place of the schedule, which stands still meanwhile
    precision_exceptions: list[PrecisionRule] | None = None  # they come before those of the run

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not is_position(self.start):
            yield Problem("start", self.start, POSITION_RULE, "50%")
        yield from blend_problems("blend", self.blend)
        yield from at_least(0, constant_lr=self.constant_lr)
        sizes = ("sequence_length", "microbatch", "global_batch")
        degrees = ("tensor", "pipeline", "context", "expert")
        yield from at_least(1, **{name: getattr(self, name) for name in (*sizes, *degrees)})


@dataclass(kw_only=True)
class Train:
    """Length and batch of the run. Batches are counted in sequences."""

    tokens: str = MISSING  # "2M"; the run ends at the first step that reaches this
    sequence_length: int = MISSING
    microbatch: int = 1  # sequences of one forward pass of one data-parallel rank
    global_batch: int = MISSING  # sequences of one step over all ranks
    batch_ramp: BatchRamp = field(default_factory=BatchRamp)
    phases: list[Phase] = field(default_factory=list)  # empty: one phase from start to end
    seed: int = 1234
    validation_interval: int = 100  # steps; 0: only at the end
    validation_batches: int = 20  # global batches of one validation

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not is_tokens(self.tokens):
            yield Problem("tokens", self.tokens, TOKENS_RULE)
        yield from at_least(
            1,
            sequence_length=self.sequence_length,
            microbatch=self.microbatch,
            global_batch=self.global_batch,
            validation_batches=self.validation_batches,
        )
        yield from at_least(0, seed=self.seed, validation_interval=self.validation_interval)


@dataclass(kw_only=True)
class TrainJob:
    """Everything a training run needs to know."""

    run_dir: str = MISSING
    train: Train = field(default_factory=Train)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    data: Data = field(default_factory=Data)
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    objective: NextToken = field(default_factory=NextToken)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    recovery: Recovery = field(default_factory=Recovery)
    tracking: Tracking = field(default_factory=Tracking)
    runtime: Runtime = field(default_factory=Runtime)
    profile: Profile = field(default_factory=Profile)
