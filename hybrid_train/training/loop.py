"""The one training loop."""

from dataclasses import dataclass, field

from hybrid_train.data.loader import Loader
from hybrid_train.training.engine import Engine
from hybrid_train.training.hook import HookList
from hybrid_train.training.state import TrainState


@dataclass
class Run:
    """A run that is ready to train, or is training."""

    engine: Engine
    batches: Loader
    token_budget: int
    state: TrainState = field(default_factory=TrainState)
    hooks: HookList = field(default_factory=HookList)
    stop_requested: bool = False  # set by a hook, on all ranks alike

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
                run.batches, tokens_seen=run.state.tokens, sequences=run.batches.global_batch
            )
            run.state.advance(
                sequences=report.sequences, sequence_length=run.engine.sequence_length
            )
            run.hooks.step_end(run, report)
        run.hooks.fit_end(run)
    except BaseException:
        run.hooks.fit_failed(run)
        raise
    return run.state
