"""The jobs `data tokenize` and `data train_tokenizer`, and the progress that they show."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hybrid_train.data.prepare.blocks import Sample
from hybrid_train.data.prepare.inputs import find_sources
from hybrid_train.data.prepare.manifest import Counts
from hybrid_train.data.prepare.manifest import Progress as Position
from hybrid_train.data.prepare.tokenization import Finished, tokenize
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.runtime.logs import say_through, start_logging
from hybrid_train.schema.names import listed, listed_paths
from hybrid_train.schema.prepare import TokenizeJob, TrainTokenizerJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes, show_tokens

_LINE_S = 30.0  # between lines where there is no terminal
_SOURCE_HEADS = ("source", "documents", "tokens", "text", "bad", "empty", "binary")
_SHOWN_SOURCES = 20
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


def run_tokenize(job: TokenizeJob) -> None:
    """Tokenize, or go on with it, and say what came of each source."""
    start_logging()
    workers = job.workers or len(os.sched_getaffinity(0))
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        finished = tokenize(job, workers, shown.update)
    page = console()
    show_numbers(page, list(_source_rows(finished)), _SOURCE_HEADS)
    page.print(f"\n{shown.speed()}", soft_wrap=True)
    manifest = finished.manifest
    page.print(f"{job.output}.bin, .idx: {manifest.dtype} ids; {job.output}.json: the manifest")
    bad = sum(counts.bad for counts in finished.counts.values())
    if bad:
        page.print(f"{job.output}.bad.jsonl: {bad} lines without a document, with their reasons")


def _source_rows(finished: Finished) -> list[tuple[str, ...]]:
    listed = list(finished.counts.items())
    rows = [_source_row(path, counts) for path, counts in listed[:_SHOWN_SOURCES]]
    if len(listed) > _SHOWN_SOURCES:
        rows.append((f"... {len(listed) - _SHOWN_SOURCES} more, in the manifest", *[""] * 6))
    total = Counts()
    for _, counts in listed:
        total.add(counts)
    return [*rows, _source_row("total", total)]


def _source_row(name: str, counts: Counts) -> tuple[str, ...]:
    figures = (counts.bad, counts.empty, counts.binary)
    return (
        name, f"{counts.documents:,}", show_tokens(counts.tokens), show_bytes(counts.text_bytes),
        *(f"{figure:,}" for figure in figures),
    )  # fmt: skip


def run_train_tokenizer(job: TrainTokenizerJob) -> None:
    """Train on a sample and write the folder, whole or not at all.

    Raises:
        UserError: if the folder exists or cannot be written, or the sample holds no text.
    """
    start_logging()
    output = Path(job.output)
    if os.path.lexists(output):
        raise UserError(f"{output} exists; choose another output=, or remove it")
    sources = find_sources(listed_paths(job.input), job.format, job.suffixes)
    partial = _begin_folder(output)
    try:
        sample = Sample(sources, job.text_key, job.block_kb * 1024, job.sample_share, job.seed)
        tokenizer = _trained_tokenizer(job, sample)
        tokenizer.save(partial)
        partial.rename(output)
    except OSError as error:
        raise _cannot_write(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it is gone if all went well
    _log.info(
        "%s: vocabulary %d of %d asked for, from %s, %s of text",
        output, tokenizer.vocab_size, job.vocab_size, counted(sample.documents, "document"),
        show_bytes(sample.characters),
    )  # fmt: skip


def _begin_folder(output: Path) -> Path:
    """Make the folder that becomes the output: now, since training may take hours."""
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(output, error) from error
    return partial


def _cannot_write(output: Path, error: OSError) -> UserError:
    return UserError(f"output={output} cannot be written: {error.strerror or error}")


def _trained_tokenizer(job: TrainTokenizerJob, sample: Sample) -> Tokenizer:
    tokenizer = train_byte_level_bpe(sample, job.vocab_size, listed(job.special_tokens))
    if not sample.documents:
        raise UserError(
            f"no document in the sample of {counted(len(sample.sources), 'source')}, "
            f"{counted(sample.bad, 'bad line')}; check input=, text_key= and sample_share="
        )
    if sample.bad:
        _log.warning("left out, since they hold no document: %s", counted(sample.bad, "line"))
    return tokenizer
