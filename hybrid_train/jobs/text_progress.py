"""How far a job that reads text is: a bar on a terminal, else a line now and then."""

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hybrid_train.data.prepare.manifest import Progress as Position
from hybrid_train.runtime.logs import say_through
from hybrid_train.schema.units import show_tokens

_LINE_S = 30.0  # between lines where there is no terminal
_log = logging.getLogger(__name__)


class TextProgress:
    """Shows positions of a tokenization on stderr; a context that ends the bar.

    The bar appears with the first position: nothing is shown where nothing is tokenized.

    Args:
        terminal: whether there is one.
        clock: seconds.
    """

    def __init__(self, *, terminal: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: Position | None = None
        self._last: Position | None = None
        self._started = self._said = clock()
        self._bar: Progress | None = None
        if terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("tokenizing", total=None, figures="")

    def __enter__(self) -> "TextProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None and self._start is not None:
            say_through(None)
            self._bar.stop()

    def update(self, now: Position) -> None:
        """Show a position; the first one is where this process starts."""
        if self._start is None:
            self._start, self._started = now, self._clock()
            self._said = self._started
            if self._bar is not None:
                self._bar.start()
                say_through(self._bar.console.print)
            if now.documents:
                _log.info(
                    "going on behind document %d (%s tokens)",
                    now.documents, show_tokens(now.tokens),
                )  # fmt: skip
        self._last = now
        if self._bar is not None:
            self._bar.update(
                self._task, total=now.total_bytes, completed=now.bytes_read, figures=self._figures()
            )
        elif self._clock() - self._said >= _LINE_S:
            self._said = self._clock()
            share = now.bytes_read / max(now.total_bytes, 1)
            _log.info("%.1f%%  %s  left %s", 100 * share, self._figures(), self._left())

    def speed(self) -> str:
        """Return what this process did: tokens, seconds, tokens per second."""
        if self._start is None or self._last is None:
            return "everything was there already"
        tokens = self._last.tokens - self._start.tokens
        return (
            f"{show_tokens(tokens)} tokens in {self._seconds():.1f} s: "
            f"{show_tokens(tokens / self._seconds())} tokens/s"
        )

    def _figures(self) -> str:
        assert self._start is not None
        assert self._last is not None
        rate = (self._last.tokens - self._start.tokens) / self._seconds()
        bad = f"  {self._last.bad} bad" if self._last.bad else ""
        return (
            f"{show_tokens(self._last.documents)} documents  {show_tokens(self._last.tokens)} "
            f"tokens  {show_tokens(rate)} tok/s{bad}"
        )

    def _left(self) -> str:
        assert self._start is not None
        assert self._last is not None
        done = self._last.bytes_read - self._start.bytes_read
        if done <= 0:
            return "unknown"
        seconds = self._seconds() * (self._last.total_bytes - self._last.bytes_read) / done
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"

    def _seconds(self) -> float:
        return max(self._clock() - self._started, 1e-9)
