"""A thread that copies checkpoints behind a URL while training goes on, the newest first.

There is one of it, on the main process: all processes write into one run folder, so one can read
all of it, and no step has to agree on how far the others are. Its share of the network of one
machine is the limit of how fast a checkpoint can go.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hybrid_train.checkpoint.layout import Found
from hybrid_train.checkpoint.mirror import Mirror, TakenOverError
from hybrid_train.config.fsspec import in_words, patient
from hybrid_train.config.secrets import masked
from hybrid_train.schema.problems import UserError

_log = logging.getLogger(__name__)


class Copier:
    """Copies one checkpoint at a time; of those that wait, the newest alone is copied.

    Args:
        url: the folder of the run there.
        run_dir: the run folder.
        beside: what a resume needs beside the checkpoints; what is not there is left out.
        keep: newest checkpoints that stay at the URL.
        patience_s: how long faults are tried again before the copy of a checkpoint is given up.
        note: called in the thread with the step and the cause of each copy that is given up.

    Raises:
        UserError: if the URL cannot be written.
    """

    def __init__(
        self,
        url: str,
        run_dir: Path,
        beside: Sequence[Path],
        *,
        keep: int,
        patience_s: float,
        note: Callable[[int, str], None],
    ) -> None:
        self._run_dir, self._beside, self._keep = run_dir, beside, keep
        self._patience_s, self._note = patience_s, note
        self._mirror = Mirror(url, lambda: patient(patience_s), self._told)
        self._url = masked(self._mirror.url)
        self._end = Mirror(url)  # its tries are few: somebody waits for it
        self._owner, before = self._end.claim(run_dir)
        if before:
            _log.warning(
                "%s was in use by %s, which did not say that it ended: it is this run's now, and "
                "the other, should it still train, copies no more",
                *(self._url, before),
            )
        self._changed = threading.Condition()
        self._next: Found | None = None
        self._present: Found | None = None
        self._away_since: float | None = None
        self._failure = ""
        self._closed = False
        # A daemon: an end that cannot wait for the network does not.
        self._thread = threading.Thread(target=self._work, name="copier", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint that is being copied, which must stay until it is."""
        present = self._present
        return present.step if present is not None else None

    @property
    def failure(self) -> str:
        """Why the newest checkpoint is not at the URL; empty if it is, or is on its way."""
        return self._failure

    def take(self, found: Found) -> None:
        """Copy a checkpoint as soon as the one before is done."""
        with self._changed:
            self._next = found
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait so long at most; tell whether nothing is left to copy."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._next is None and self._present is None, timeout_s
            )

    def close(self) -> None:
        """Copy no more; where all is copied, how the run ended is, too, and the URL is free."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._failure or not self.wait(0):
            return
        try:
            self._end.copy_beside(self._run_dir, self._beside)
            self._end.release(self._owner)
        except UserError as error:
            _log.warning("the checkpoints are copied, how the run ended is not: %s", error)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closed)
                if self._closed:
                    return
                found, self._next = self._next, None
                self._present = found
            assert found is not None, "it was waited for"
            failure = self._copied(found)
            with self._changed:
                self._present, self._failure = None, failure
                self._changed.notify_all()

    def _copied(self, found: Found) -> str:
        """Copy a checkpoint and remove those that are too old; return why that was not done."""
        start = time.perf_counter()
        try:
            copied = self._mirror.copy(found, self._beside, self._owner)
        except Exception as error:  # the thread goes on with the next checkpoint
            if not found.path.exists():
                _log.info(
                    "step %d was not copied: newer checkpoints stand in its place", found.step
                )
                return "a newer one is to be copied"
            return self._given_up(found, error)
        seconds = time.perf_counter() - start
        try:
            self._mirror.tidy(self._keep, self._owner)
        except Exception as error:  # it is copied; what is too old goes the next time
            words = error if isinstance(error, UserError) else in_words(error)
            _log.warning("old checkpoints at %s were not removed: %s", self._url, words)
        if copied:
            _log.info(
                "copied %s to %s: %.1f MB in %.1f s",
                found.path.name,
                self._url,
                copied / 1e6,
                seconds,
            )
        return ""

    def _given_up(self, found: Found, error: Exception) -> str:
        cause = str(error) if isinstance(error, UserError) else in_words(error)
        again = (
            "this run copies no more"
            if isinstance(error, TakenOverError)
            else "the next save tries"
        )
        _log.warning(
            "%s was not copied: %s; training goes on, %s is whole, and %s",
            *(found.path.name, cause, found.path, again),
        )
        self._note(found.step, cause)
        return cause

    def _told(self, error: Exception | None) -> None:
        """Say once that the URL cannot be reached, and once that it can."""
        if error is not None and self._away_since is None:
            self._away_since = time.monotonic()
            _log.warning(
                "%s cannot be reached: %s; training goes on, and the copy is tried again for %g s",
                *(self._url, in_words(error), self._patience_s),
            )
        if error is None and self._away_since is not None:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            _log.warning("%s is reached again, after %.0f s", self._url, away_s)
