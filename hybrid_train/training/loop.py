"""The one training loop."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import BatchSource
from hybrid_train.schema.recovery import Recovery
from hybrid_train.training.bad_steps import BadSteps
from hybrid_train.training.engine import Engine
from hybrid_train.training.hook import HookList
from hybrid_train.training.state import TrainState


@dataclass
class Run:
    """A run that is ready to train, or is training; a hook may bring it into another phase.

    Attributes:
        engine: takes the steps of the present phase.
        batches: what they are taken on.
        validation: what the present phase is validated on; iterate it once for each.
        flops_per_token: of training, in the present phase.
        token_budget: tokens of the whole run.
        bad_steps: which steps are not taken.
        state: its position.
        hooks: what reacts to the loop.
        stop_requested: set by a hook, on all ranks alike.
    """

    engine: Engine
    batches: BatchSource
    token_budget: int
    bad_steps: BadSteps = field(default_factory=lambda: BadSteps(Recovery()))
    validation: Iterable[Batch] | None = None
    flops_per_token: float = 0.0
    state: TrainState = field(default_factory=TrainState)
    hooks: HookList = field(default_factory=HookList)
    stop_requested: bool = False

    @property
    def is_complete(self) -> bool:
        """Tell whether the token budget is spent."""
        return self.state.tokens >= self.token_budget


def fit(run: Run) -> TrainState:
    """Train until the token budget is spent or a hook asks to stop."""
    try:
        run.hooks.fit_start(run)
        while not (run.is_complete or run.stop_requested):
            run.hooks.step_start(run)
            report = run.engine.step(
                run.batches,
                tokens_seen=run.state.tokens,
                sequences=run.batches.global_batch,
                bad_steps=run.bad_steps,
            )
            run.state.advance(
                tokens=report.sequences * run.engine.sequence_length,
                source_tokens=report.source_tokens,
            )
            run.hooks.step_end(run, report)
        run.hooks.fit_end(run)
    except BaseException:
        run.hooks.fit_failed(run)
        raise
    return run.state
