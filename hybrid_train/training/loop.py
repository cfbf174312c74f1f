"""The one training loop, the state of a run, and the hooks that react to its events.

    fit_start(run)
    while tokens are left and nobody asked to stop:
        step_start(run)
        ... one step ...
        step_end(run, report)
    fit_end(run)

When an exception ends any of this, `fit_failed(run)` is called. Hooks are called in the order of
the list; at `step_end` the step is already counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import BatchSource
from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.training.bad_steps import BadSteps
from hybrid_train.training.engine import Engine, StepReport


@dataclass
class TrainState:
    """Position of a run; saved with every checkpoint.

    The tokens say which data is next, where that follows from config and data; another source of
    batches and an objective may keep plain data of their own beside them.
    """

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen by all ranks
    source_tokens: dict[str, int] = field(default_factory=dict)  # the labels of each source
    batches: dict[str, Any] = field(default_factory=dict)  # see data.loader.BatchSource
    objective: dict[str, float] = field(default_factory=dict)  # see Objective.state_dict

    def advance(self, *, tokens: int, source_tokens: Mapping[str, int]) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        for source, count in source_tokens.items():
            self.source_tokens[source] = self.source_tokens.get(source, 0) + count

    def position(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; what has no state takes no place."""
        found = asdict(self)
        for name in ("batches", "objective"):
            if not found[name]:
                del found[name]
        return found


class Hook:
    """Does nothing; a hook overrides the events it cares about."""

    def fit_start(self, run: "Run") -> None: ...

    def step_start(self, run: "Run") -> None: ...

    def step_end(self, run: "Run", report: StepReport) -> None: ...

    def fit_end(self, run: "Run") -> None: ...

    def fit_failed(self, run: "Run") -> None:
        """Give back what the hook holds, such as the terminal; must not raise."""


@dataclass
class HookList(Hook):
    """Hooks that are called one after the other."""

    hooks: list[Hook] = field(default_factory=list)

    def fit_start(self, run: "Run") -> None:
        for hook in self.hooks:
            hook.fit_start(run)

    def step_start(self, run: "Run") -> None:
        for hook in self.hooks:
            hook.step_start(run)

    def step_end(self, run: "Run", report: StepReport) -> None:
        for hook in self.hooks:
            hook.step_end(run, report)

    def fit_end(self, run: "Run") -> None:
        for hook in self.hooks:
            hook.fit_end(run)

    def fit_failed(self, run: "Run") -> None:
        for hook in self.hooks:
            hook.fit_failed(run)


@dataclass
class Run:
    """A run that is ready to train, or is training; a hook may bring it into another phase.

    Attributes:
        engine: takes the steps of the present phase.
        batches: what they are taken on.
        validation: what the present phase is validated on; iterate it once for each.
        flops_per_token: of training, and of teachers ahead of it, in the present phase.
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
