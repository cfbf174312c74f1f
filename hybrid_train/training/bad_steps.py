"""Which steps are not taken: without labels, without finite numbers, with a spike of the loss."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping

from hybrid_train.schema.problems import UserError
from hybrid_train.schema.recovery import Recovery


class SpikeError(UserError):
    """A loss far above those before it; the same on all processes."""

    everywhere = True
    kind = "spike"


class NoLabelsError(UserError):
    """A step in which no label counts, so that it has neither loss nor gradient."""

    everywhere = True
    kind = "no labels"


class BadSteps:
    """Judges the loss of a step before its update; all processes judge alike.

    A spike is more than `spike_sigmas` standard deviations above the mean of the last
    `spike_window` losses that were taken (as SkipStepOptimizer of OLMo-core does).
    """

    def __init__(self, settings: Recovery, lines: Iterable[Mapping[str, float]] = ()) -> None:
        """Take the settings.

        Args:
            settings: what counts as bad.
            lines: metrics of the steps before, in order; of a run that goes on.
        """
        self.skips_nonfinite = settings.skip_nonfinite
        self._sigmas = settings.spike_sigmas
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self.in_a_row = 0  # steps without update up to now
        for line in lines:
            if line.get("skipped"):
                self.in_a_row += 1
            else:
                self.took(line["loss"])

    def require_usual(self, loss: float) -> None:
        """Refuse a spike.

        Raises:
            SpikeError: with the loss and what was usual.
        """
        window = self._losses
        if not self._sigmas or len(window) < (window.maxlen or 0):
            return
        mean, deviation = statistics.fmean(window), statistics.stdev(window)
        if loss > mean + self._sigmas * deviation:
            raise SpikeError(
                f"loss {loss:.4f} is {(loss - mean) / max(deviation, 1e-12):.1f} standard "
                f"deviations above the {mean:.4f} of the last {len(window)} steps"
            )

    def forget(self) -> None:
        """Begin a new window: other data or another batch may have a loss of its own."""
        self._losses.clear()

    def took(self, loss: float) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0
        if math.isfinite(loss):
            self._losses.append(loss)

    def skipped(self) -> None:
        """Count a step that was not."""
        self.in_a_row += 1
