"""Saves the run at an interval, at its end, and when it is stopped."""

import dataclasses
import logging
import time
from pathlib import Path

from hybrid_train.checkpoint import store
from hybrid_train.checkpoint.megatron import Content
from hybrid_train.config.schema.checkpoint import Checkpoint
from hybrid_train.training.engine import Engine
from hybrid_train.training.hook import Hook
from hybrid_train.training.loop import Run
from hybrid_train.training.report import StepReport

_log = logging.getLogger(__name__)


def content_of(engine: Engine) -> Content:
    """Name what a checkpoint of this run holds."""
    return Content(engine.chunks, engine.optimizer, engine.groups)


class SaveCheckpoints(Hook):
    """Writes a checkpoint; the newest `keep` stay."""

    def __init__(self, settings: Checkpoint, run_dir: Path, saved_step: int) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._saved_step = saved_step  # of the newest checkpoint of this run

    def step_end(self, run: Run, report: StepReport) -> None:
        interval = self._settings.interval
        if interval and run.state.step % interval == 0:
            self._save(run)

    def fit_end(self, run: Run) -> None:
        if run.state.step > self._saved_step:
            self._save(run)

    def _save(self, run: Run) -> None:
        start = time.perf_counter()
        position = dataclasses.asdict(run.state)
        content = content_of(run.engine)
        path = store.save(self._run_dir, content, position, keep=self._settings.keep)
        self._saved_step = run.state.step
        _log.info("saved %s in %.1f s", path, time.perf_counter() - start)
