"""The jobs `data tokenize` and `data train_tokenizer`: text to token files, and to a tokenizer."""

import logging
import os
import shutil
import sys
from pathlib import Path

from hybrid_train.data.prepare.blocks import Sample
from hybrid_train.data.prepare.inputs import find_sources
from hybrid_train.data.prepare.manifest import Counts
from hybrid_train.data.prepare.tokenization import Finished, tokenize
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.names import listed, listed_paths
from hybrid_train.schema.prepare import TokenizeJob, TrainTokenizerJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes, show_tokens

_SOURCE_HEADS = ("source", "documents", "tokens", "text", "bad", "empty", "binary")
_SHOWN_SOURCES = 20
_log = logging.getLogger(__name__)


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
