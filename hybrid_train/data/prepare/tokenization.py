"""Text to token files: blocks go out to workers, and their ids come back into place."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.data.prepare.blocks import Block, all_blocks, read_documents
from hybrid_train.data.prepare.encoder import Encoder, beginning_of_text
from hybrid_train.data.prepare.inputs import Source, find_sources
from hybrid_train.data.prepare.journal import Journal, Part
from hybrid_train.data.prepare.manifest import (
    Counts,
    Manifest,
    Output,
    Progress,
    TokenizerFacts,
    library_versions,
    read_manifest,
    write_whole,
)
from hybrid_train.data.prepare.worker_pool import WorkerPool
from hybrid_train.data.token_files import checksum, dtype_for, write_index
from hybrid_train.schema.names import listed_paths
from hybrid_train.schema.prepare import TokenizeJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_log = logging.getLogger(__name__)
_JUDGED_LINES = 1000  # before that, a share of bad lines says little


@dataclass(frozen=True)
class Finished:
    """What a tokenization made: its manifest, and the counts of each source beside their paths."""

    manifest: Manifest
    counts: dict[str, Counts]


@dataclass(frozen=True)
class _Facts:
    """What a worker must know."""

    sources: list[Source]
    text_key: str
    tokenizer: str
    dtype: str
    word_cache: bool
    begin: tuple[int, ...]


def tokenize(job: TokenizeJob, workers: int, report: Callable[[Progress], None]) -> Finished:
    """Write the token files of a job, or go on with writing them.

    Args:
        job: what to read and where to write.
        workers: number of processes; the files do not depend on it.
        report: is told how far it is, at the start and after each block.

    Raises:
        UserError: if an input or the tokenizer cannot be read, too many lines are bad, the output
            exists or the disk is full.
    """
    tokenizer = open_tokenizer(job.tokenizer)
    facts = TokenizerFacts.of(job.tokenizer, tokenizer)
    begin = beginning_of_documents(job, tokenizer)
    sources = find_sources(listed_paths(job.input), job.format, job.suffixes)
    output = Output(job.output)
    if not os.path.lexists(output.folder) and not job.overwrite:
        output.refuse_existing()  # before the folder is made
    with output.locked():
        if not job.overwrite and not Journal.is_there(output):
            output.refuse_existing()
        with Journal(
            output, _command(job, facts, sources), len(sources),
            overwrite=job.overwrite, interval_s=job.save_interval_s,
        ) as journal:  # fmt: skip
            if not journal.is_complete:
                light = [dataclasses.replace(one, files=()) for one in sources]  # blocks name files
                dtype = dtype_for(facts.vocab_size).str
                worker = _Facts(light, job.text_key, job.tokenizer, dtype, job.word_cache, begin)
                _write(job, worker, sources, workers, journal, report)
                _finish(job, facts, sources, journal, output)
            counts = dict(zip([source.path for source in sources], journal.counts, strict=True))
        output.publish()
    manifest = read_manifest(job.output)
    assert manifest is not None, "it was just written"
    return Finished(manifest, counts)


def beginning_of_documents(job: TokenizeJob, tokenizer: FolderTokenizer) -> tuple[int, ...]:
    """Return the ids that each document begins with; say so where the tokenizer would add some.

    Raises:
        UserError: if one is asked for and the tokenizer has none.
    """
    own = beginning_of_text(tokenizer)
    if own and not job.bos:
        _log.warning(
            "%s begins a text with %s (%s), the documents of these files do not; bos=true puts it "
            "there", job.tokenizer, tokenizer.decode(own), ", ".join(map(str, own)),
        )  # fmt: skip
    if not job.bos:
        return ()
    named = tokenizer.special_ids.get("bos_token")
    if not own and named is None:
        raise UserError(
            f"bos=true: the tokenizer {job.tokenizer} puts nothing before a text, and its "
            "tokenizer_config.json names no bos_token; leave bos out"
        )
    return tuple(own) if own or named is None else (named,)


def _command(job: TokenizeJob, facts: TokenizerFacts, sources: Sequence[Source]) -> dict[str, Any]:
    """Return what the token files depend on."""
    return {
        "tokenizer": facts.fingerprint,
        "text_key": job.text_key,
        "bos": job.bos,
        "block_kb": job.block_kb,
        "sources": [
            {
                "path": one.path,
                "format": one.format.name,
                "size": one.size,
                "stamp": one.stamp,
                "files": len(one.files),
            }
            for one in sources
        ],
    }


def _write(
    job: TokenizeJob, worker: _Facts, sources: Sequence[Source], workers: int,
    journal: Journal, report: Callable[[Progress], None],
) -> None:  # fmt: skip
    """Do the blocks that are not done yet."""
    before = [0, *np.cumsum([source.size for source in sources]).tolist()]
    tasks = all_blocks(sources, job.text_key, job.block_kb * 1024, journal.position)
    report(_progress(journal, before[journal.position[0]], before[-1]))
    try:
        with WorkerPool(prepare_worker, worker, workers) as pool:
            for block, part in pool.results(tasks):
                journal.append(block.source, block.number, part)
                report(_progress(journal, before[block.source] + block.bytes_read, before[-1]))
                _judge(job, journal, at_end=False)
        _judge(job, journal, at_end=True)
    except BaseException:
        with suppress(OSError):  # what stopped the job is told, and may be a full disk
            journal.save()
        raise


def prepare_worker(facts: _Facts) -> Callable[[Block], Part]:
    """Open the tokenizer in a worker; return what turns a block into ids."""
    dtype: np.dtype[np.generic] = np.dtype(facts.dtype)
    tokenizer = open_tokenizer(facts.tokenizer)
    encoder = Encoder(tokenizer, dtype, facts.begin, word_cache=facts.word_cache)
    return partial(_part, facts, encoder)


def _part(facts: _Facts, encoder: Encoder, block: Block) -> Part:
    found = read_documents(facts.sources[block.source], block, facts.text_key)
    encoded = encoder.encode(found.texts)
    counts = Counts(
        documents=len(found.texts),
        tokens=len(encoded.ids) // encoder.dtype.itemsize,
        text_bytes=sum(map(_num_bytes, found.texts)),
        lines=found.lines,
        bad=len(found.bad),
        empty=found.empty,
        binary=found.binary,
    )
    return Part(encoded.ids, encoded.lengths, found.bad, found.last_line, counts)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _progress(journal: Journal, bytes_read: int, total_bytes: int) -> Progress:
    total = journal.total
    return Progress(bytes_read, total_bytes, total.documents, total.tokens, total.bad)


def _judge(job: TokenizeJob, journal: Journal, *, at_end: bool) -> None:
    """Stop where too many lines are bad; the work stays unless there is none worth it."""
    total = journal.total
    enough = at_end or total.lines >= _JUDGED_LINES
    if not enough or not total.bad or total.bad <= job.max_bad_share * total.lines:
        return
    first = journal.first_bad
    assert first is not None, "some are bad"
    stands = f"All are in {journal.bad_path}. Fix the input (then overwrite=true)"
    raise UserError(
        f"{total.bad} of {total.lines} lines hold no document, more than "
        f"max_bad_share={job.max_bad_share:g} allows. The first, {first.file} line {first.line}, "
        f"{first.reason}. {stands}, or allow more: max_bad_share=..., which goes on from here"
    )


def _finish(
    job: TokenizeJob, facts: TokenizerFacts, sources: Sequence[Source], journal: Journal,
    output: Output,
) -> None:  # fmt: skip
    """Write index and manifest.

    Raises:
        UserError: if there is no document.
    """
    total = journal.total
    if not total.documents:
        output.discard()
        raise UserError(
            f"no document in {counted(len(sources), 'source')}: {total.empty} empty, "
            f"{total.bad} bad, {total.binary} binary; check input= and format="
        )
    dtype = dtype_for(facts.vocab_size)
    write_index(output.path(".idx"), dtype, journal.lengths())
    manifest = Manifest(
        documents=total.documents,
        tokens=total.tokens,
        dtype=dtype.name,
        tokenizer=facts,
        sources=[
            {"path": source.path, "bytes": source.size, **asdict(counts)}
            for source, counts in zip(sources, journal.counts, strict=True)
        ],
        checksums={"bin": journal.bin_checksum, "idx": checksum(output.path(".idx"))},
        versions=library_versions(),
    )
    write_whole(output.path(".json"), manifest.text())
    journal.complete()
