"""The job `data tokenize`: text into token files, with a bar, and a table at the end."""

import os
import sys

from hybrid_train.data.prepare.manifest import Counts
from hybrid_train.data.prepare.tokenization import Finished, tokenize
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.jobs.progress import TextProgress
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.prepare import TokenizeJob
from hybrid_train.schema.units import show_bytes, show_tokens

_HEADS = ("source", "documents", "tokens", "text", "bad", "empty", "binary")
_SHOWN_SOURCES = 20


def run(job: TokenizeJob) -> None:
    """Tokenize, or go on with it, and say what came of each source."""
    start_logging()
    workers = job.workers or len(os.sched_getaffinity(0))
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        finished = tokenize(job, workers, shown.update)
    page = console()
    show_numbers(page, list(_rows(finished)), _HEADS)
    page.print(f"\n{shown.speed()}", soft_wrap=True)
    manifest = finished.manifest
    page.print(f"{job.output}.bin, .idx: {manifest.dtype} ids; {job.output}.json: the manifest")
    bad = sum(counts.bad for counts in finished.counts.values())
    if bad:
        page.print(f"{job.output}.bad.jsonl: {bad} lines without a document, with their reasons")


def _rows(finished: Finished) -> list[tuple[str, ...]]:
    listed = list(finished.counts.items())
    rows = [_row(path, counts) for path, counts in listed[:_SHOWN_SOURCES]]
    if len(listed) > _SHOWN_SOURCES:
        rows.append((f"... {len(listed) - _SHOWN_SOURCES} more, in the manifest", *[""] * 6))
    total = Counts()
    for _, counts in listed:
        total.add(counts)
    return [*rows, _row("total", total)]


def _row(name: str, counts: Counts) -> tuple[str, ...]:
    figures = (counts.bad, counts.empty, counts.binary)
    return (
        name, f"{counts.documents:,}", show_tokens(counts.tokens), show_bytes(counts.text_bytes),
        *(f"{figure:,}" for figure in figures),
    )  # fmt: skip
