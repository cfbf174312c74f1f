"""Brings the run into its next phase at the step with which that begins."""

from collections.abc import Callable, Sequence

from hybrid_train.planning.phases import Stretch, at
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run


class EnterPhases(Hook):
    """Calls `enter(run, phase, phase before)` between two steps of different phases."""

    def __init__(
        self, phases: Sequence[Stretch], enter: Callable[[Run, Stretch, Stretch], None]
    ) -> None:
        self._phases = phases
        self._enter = enter
        self._present: Stretch | None = None

    def fit_start(self, run: Run) -> None:
        self._present = at(self._phases, run.state.tokens)

    def step_start(self, run: Run) -> None:
        phase = at(self._phases, run.state.tokens)
        if phase is not self._present and self._present is not None:
            self._enter(run, phase, self._present)
            self._present = phase
