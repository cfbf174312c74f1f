"""The data of a run: from its section to the batches of each phase; the loss of a unigram model."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.any_tokenizer import AnyTokenizer
from hybrid_train.data.batch import RowReader, RowTransform, Sequences
from hybrid_train.data.documents import Documents, Joined
from hybrid_train.data.index_cache import IndexCache
from hybrid_train.data.loader import Loader, Validation
from hybrid_train.data.plan import (
    HeldOut,
    OpenSources,
    PhasePlan,
    describe_phases,
    hold_out,
    plan_phases,
)
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.data.quickstart import Report, folder_of, prepare
from hybrid_train.data.quickstart import read_manifest as read_quickstart
from hybrid_train.data.sources import open_source, own_vocabulary, tokenizer_of
from hybrid_train.data.token_files import beyond_vocabulary, place_beyond, spaced_parts, verify
from hybrid_train.planning.phases import PhaseSpan, global_batch
from hybrid_train.schema.data import Data, Quickstart, Split, named_sources, needs_tokenizer
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.units import counted, show_tokens

_AT_MOST_TOKENS = 100_000_000  # of each file; counts of a longer one come from evenly spaced parts
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run reads from, open.

    Attributes:
        tokenizer: of the sources.
        names: of the sources, in the order of their numbers in a batch.
        plans: the rows of every phase.
        data: the section that it was opened from.
        train: the sources of the train split.
        held_out: those of the validation split; none if the run names no validation data.
        transforms: what changes each row between reading and stacking, one after the other.
    """

    tokenizer: AnyTokenizer
    names: list[str]
    plans: list[PhasePlan]
    data: Data
    train: OpenSources
    held_out: OpenSources
    transforms: tuple[RowTransform, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the sources can hold; the model may pad it."""
        return self.tokenizer.vocab_size

    def loader(
        self, phase_span: PhaseSpan, *, data_rank: int, data_size: int, tokens_seen: int
    ) -> Loader:
        """Return the microbatches of one data-parallel rank from a position on."""
        train = phase_span.job.train

        def batch_at(consumed: int) -> int:
            return global_batch(train, phase_span.start + consumed * train.sequence_length)

        return Loader(
            self.rows(phase_span),
            microbatch=train.microbatch,
            global_batch=batch_at,
            data_rank=data_rank,
            data_size=data_size,
            consumed_sequences=phase_span.sequences_before(tokens_seen),
        )

    def validation(
        self, phase_span: PhaseSpan, *, data_rank: int, data_size: int
    ) -> Validation | None:
        """Return the validation of a phase for one data-parallel rank; None without data."""
        if not self.held_out.documents:
            return None
        return Validation(
            self.held_out_rows(phase_span),
            num_sequences=self.held_out_length(phase_span),
            microbatch=phase_span.job.train.microbatch,
            data_rank=data_rank,
            data_size=data_size,
        )

    def rows(self, phase_span: PhaseSpan) -> RowReader:
        """Return the rows of a phase by number."""
        return self._reader(self.plans[phase_span.number].mixture, phase_span, Split.train)

    def held_out_rows(self, phase_span: PhaseSpan) -> RowReader:
        """Return the rows of its validation by number."""
        return self._reader(self._held_out(phase_span), phase_span, Split.validation)

    def held_out_length(self, phase_span: PhaseSpan) -> int:
        """Return how many rows its validation has; 0 without data."""
        return len(self._held_out(phase_span)) if self.held_out.documents else 0

    def _reader(self, rows: Sequences, phase_span: PhaseSpan, split: Split) -> RowReader:
        start = phase_span.start if split is Split.train else 0
        return RowReader(rows, self.transforms, split, phase_span.job.train.seed, start)

    def _held_out(self, phase_span: PhaseSpan) -> HeldOut:
        job = phase_span.job
        return hold_out(job.data, job.train, self.held_out, self.names)

    def description(self) -> list[str]:
        """Say what is read, one line for the log per fact."""
        lines = [
            f"train data: {_size(self.train)}, vocabulary {self.vocab_size}",
            *describe_phases(self.plans, self.train, self.data.warn_epochs, _log.warning),
        ]
        if not self.held_out.documents:
            return [*lines, "validation data: none (the run names no validation files)"]
        for plan in self.plans:
            length = plan.phase_span.job.train.sequence_length
            for one in self._held_out(plan.phase_span).sets:
                used = show_tokens(one.used * length)
                line = f"validation data of {self.names[one.source]}: {used} tokens used"
                if one.used < one.wanted:
                    line += f", all it has: {one.used} of the {one.wanted} sequences asked for"
                lines.append(line)
        return list(dict.fromkeys(lines))

    @cached_property
    def unigram_cross_entropy(self) -> float | None:
        """Validation loss of the train unigram distribution in nats per token.

        None unless all data are local files. Counts tokens on first use: main process only.
        """
        sources = list(named_sources(self.data).values())
        train = [prefix for source in sources for prefix in source.train]
        validation = [prefix for source in sources for prefix in source.validation]
        streams = [source for source in sources if source.stream is not None]
        if not validation or streams or any("://" in one for one in train + validation):
            return None
        return unigram_cross_entropy(train, validation, self.vocab_size)


def check_data(data: Data) -> None:
    """Refuse data that cannot be read, before anything is written; costs milliseconds.

    Raises:
        ConfigError: if the section names no train files or no tokenizer.
        UserError: if a file is missing, truncated or from another tokenizer.
    """
    if isinstance(data, Quickstart):
        if os.path.lexists(folder_of(data)):
            read_quickstart(folder_of(data))
        return
    _open(data)


def open_data(
    data: Data,
    phase_spans: list[PhaseSpan],
    transforms: Sequence[RowTransform] = (),
    *,
    barrier: Callable[[], None],
    is_main: bool,
    report: Report | None = None,
) -> RunData:
    """Open the data of a run; every process calls it.

    Args:
        data: the section of the run.
        phase_spans: its phases.
        transforms: what changes each row between reading and stacking, one after the other.
        barrier: waits for all processes.
        is_main: true in one process, which builds and writes what the others then read.
        report: is called there with how far a corpus is that is built.

    Raises:
        ConfigError, UserError: as `check_data`, or if a folder cannot be written.
    """
    if isinstance(data, Quickstart):
        data = _quickstart(data, barrier, report, is_main=is_main)
    tokenizer, train, held_out = _open(data)
    if not is_main:
        barrier()  # the main process builds the large indices, the others read them
    names = list(named_sources(data))
    plans = plan_phases(phase_spans, train, names)
    for plan in plans:
        plan.prepare()
    if is_main:
        barrier()
    return RunData(tokenizer, names, plans, data, train, held_out, tuple(transforms))


def _open(data: Data) -> tuple[AnyTokenizer, OpenSources, OpenSources]:
    problems = []
    sources = named_sources(data)
    if not any(source.has(Split.train) for source in sources.values()):
        problems.append(Problem("data.train", data.train, "must name at least one prefix"))
    if data.tokenizer is None and needs_tokenizer(data):
        problems.append(Problem("data.tokenizer", None, "must name the folder of a tokenizer"))
    if problems:
        raise ConfigError(problems)
    tokenizer = tokenizer_of(data)
    _require_same_tokenizer(data, tokenizer)
    cache = IndexCache(_cache_folder(data))
    longest = {name: one.longest for name, one in sources.items() if one.longest is not None}
    train, held_out = (
        OpenSources(_documents(data, split, tokenizer), longest, tokenizer.end_of_document, cache)
        for split in (Split.train, Split.validation)
    )
    return tokenizer, train, held_out


def _documents(data: Data, split: Split, tokenizer: AnyTokenizer) -> dict[str, Joined]:
    size = tokenizer.vocab_size
    return {
        name: _joined(name, open_source(source, split, tokenizer, data.remote), split, size)
        for name, source in named_sources(data).items()
        if source.has(split)
    }


def open_held_out(data: Data, tokenizer: AnyTokenizer) -> dict[str, Joined]:
    """Open the validation split of a run that is over, by source; without one there is nothing.

    Args:
        data: the section of the run; nothing is built that is not there any more.
        tokenizer: of the run; streams have their own words.

    Raises:
        UserError: if files are missing, or their tokenizer is another one.
    """
    if isinstance(data, Quickstart):
        if not os.path.lexists(folder_of(data)):
            raise UserError(
                f"the quickstart corpus {folder_of(data)} is not there any more; name token files: "
                "task.heldout.files=[PREFIX]"
            )
        data = prepare(data)
    _require_same_tokenizer(data, tokenizer)
    words = own_vocabulary(named_sources(data).values())
    return _documents(data, Split.validation, words or tokenizer)


def _joined(name: str, parts: Sequence[Documents], split: Split, vocab_size: int) -> Joined:
    """Join the files of a source.

    Raises:
        UserError: if there is no token in them, however many documents they have.
    """
    joined = Joined(name, parts, vocab_size)
    if not joined.tokens:
        files = ", ".join(part.name for part in parts)
        raise UserError(
            f"the {split.value} part of source {name} holds no token: all {len(joined):,} "
            f"documents of {files} are empty; leave it out, or write the files anew"
        )
    return joined


def _require_same_tokenizer(data: Data, tokenizer: AnyTokenizer) -> None:
    """Refuse files whose manifest says that another tokenizer made them.

    Raises:
        UserError: with all of them.
    """
    found = []
    for name, source in named_sources(data).items():
        for prefix in (*source.train, *source.validation):
            manifest = None if "://" in prefix else read_manifest(prefix)
            made_by = manifest.tokenizer if manifest else None
            if made_by is not None and made_by.fingerprint != tokenizer.fingerprint:
                found.append(f"  {prefix} (source {name}) by {made_by.path}")
    if found:
        lines = "\n".join(found)
        raise UserError(
            f"data.tokenizer={data.tokenizer} did not make the ids of these files:\n{lines}\n"
            "All sources of a run need one tokenizer: tokenize these anew, or name theirs"
        )


def _quickstart(
    config: Quickstart, barrier: Callable[[], None], report: Report | None, *, is_main: bool
) -> Data:
    if is_main:
        prepare(config, report=report)
    barrier()
    return prepare(config)  # there by now, for every process


def _cache_folder(data: Data) -> Path | None:
    if data.cache is not None:
        return Path(data.cache)
    local = [
        prefix
        for source in named_sources(data).values()
        for prefix in source.train
        if "://" not in prefix
    ]
    return Path(local[0]).parent / "index_cache" if local else None


def _size(opened: OpenSources) -> str:
    total = sum(one.tokens for one in opened.documents.values())
    documents = sum(len(one) for one in opened.documents.values())
    return f"{show_tokens(total)} tokens in {counted(documents, 'document')}"


def unigram_cross_entropy(
    train_prefixes: Sequence[str], validation_prefixes: Sequence[str], vocab_size: int
) -> float:
    """Cross-entropy of the train unigram distribution on the validation part, nats per token.

        p(v)   = (n_train(v) + 1) / (n_train + vocab_size)         add-one smoothing
        result = - sum_v n_validation(v) * log p(v) / n_validation

    Raises:
        UserError: if a prefix cannot be read or holds tokens beyond the vocabulary.
    """
    train = count_tokens(train_prefixes, vocab_size) + 1
    validation = count_tokens(validation_prefixes, vocab_size)
    log_p = np.log(train / train.sum())
    return float(-(validation * log_p).sum() / validation.sum())


def count_tokens(prefixes: Sequence[str], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each token occurs: [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for prefix in prefixes:
        for part in spaced_parts(verify(prefix, vocab_size), _AT_MOST_TOKENS):
            if (place := place_beyond(part, vocab_size)) is not None:
                raise beyond_vocabulary(f"{prefix}.bin", f"token {part[place]}", vocab_size)
            counts += np.bincount(part, minlength=vocab_size)
    return counts
