"""What an edit, a hook and a row transform do."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch.nn import Module

from hybrid_train.data.batch import Row
from hybrid_train.model.edits import Stage
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run
from my_package.parts import Freeze, LossAverage, SkipStart

_log = logging.getLogger(f"hybrid_train.{__name__}")  # a run shows what this family says


class FreezeParameters:
    """Takes parameters out of training; their optimizer state is never made."""

    stage = Stage.freeze

    def __init__(self, settings: Freeze) -> None:
        self._names = settings.names

    def apply(self, chunks: Sequence[Module]) -> None:
        """Change the chunks of this process."""
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if any(fnmatchcase(name, pattern) for pattern in self._names):
                    parameter.requires_grad_(False)
                    _log.info("frozen: %s", name)


class AverageLoss(Hook):
    """Adds `own/loss_average` to the metrics of a step."""

    def __init__(self, settings: LossAverage) -> None:
        self._decay = settings.decay
        self._average: float | None = None

    def step_end(self, run: Run, report: StepReport) -> None:
        """Take the loss of a step into the average."""
        if not report.skipped:
            before = report.loss if self._average is None else self._average
            self._average = self._decay * before + (1 - self._decay) * report.loss
            report.metrics["own/loss_average"] = self._average


class SkipFirstLabels:
    """Gives the first labels of a row no weight."""

    def __init__(self, settings: SkipStart) -> None:
        self._share = settings.share

    def __call__(self, row: Row) -> Row:
        """Return what stands for a row; the row itself stays as it is."""
        weights = row.loss_weights.copy()
        weights[: int(self._share * len(weights))] = 0
        return replace(row, loss_weights=weights)
