"""Finished token files: merged, split by shares or tokens, verified, and shown as a histogram."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hybrid_train.data.prepare.manifest import (
    Manifest,
    Output,
    TokenizerFacts,
    library_versions,
    read_manifest,
    write_whole,
)
from hybrid_train.data.token_files import TokenReader, checksum, write_index
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

_BAR_WIDTH = 50  # characters of the longest bar
_CHUNK_TOKENS = 2**23  # that are held at a time
_CHUNK = 2**20  # documents, or sequences, of which the index is held at a time
_COPIED_BYTES = 2**23


class _Writer:
    """One pair of token files on its way; a context that makes it appear if nothing failed."""

    def __init__(self, prefix: str, like: TokenReader, *, overwrite: bool) -> None:
        self._output = Output(prefix)
        if not overwrite:
            self._output.refuse_existing()
        self._stack = ExitStack()
        self._dtype = like.facts.dtype
        self._digest = hashlib.sha256()
        self._lengths: list[NDArray[np.int32]] = []  # 4 bytes a document: less than the .idx
        self._boundaries: list[NDArray[np.int64]] = []
        self._sequences = 0
        self.prefix = prefix
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> "_Writer":
        self._stack.enter_context(self._output.locked())
        self._file: BinaryIO = self._stack.enter_context(self._output.path(".bin").open("wb"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._output.discard()
        self._stack.close()

    def add_bytes(self, content: bytes) -> None:
        """Append ids."""
        self._digest.update(content)
        self._file.write(content)

    def add_index(self, lengths: NDArray[np.int32], first_sequences: NDArray[np.int64]) -> None:
        """Say how the ids are cut: tokens of each sequence, first sequence of each document."""
        self._lengths.append(np.array(lengths))
        self._boundaries.append(first_sequences + self._sequences)
        self._sequences += len(lengths)
        self.documents += len(first_sequences)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def finish(self, tokenizer: TokenizerFacts | None, sources: list[dict[str, Any]]) -> None:
        """Write index and manifest, and let the files appear."""
        self._file.flush()
        output = self._output
        ends = np.array([self._sequences], np.int64)
        boundaries = np.concatenate([*self._boundaries, ends])
        write_index(output.path(".idx"), self._dtype, np.concatenate(self._lengths), boundaries)
        manifest = Manifest(
            documents=self.documents,
            tokens=self.tokens,
            dtype=self._dtype.name,
            tokenizer=tokenizer,
            sources=sources,
            checksums={"bin": self._digest.hexdigest(), "idx": checksum(output.path(".idx"))},
            versions=library_versions(),
        )
        write_whole(output.path(".json"), manifest.text())
        output.publish()


def merge(prefixes: Sequence[str], output: str, *, overwrite: bool) -> tuple[int, int]:
    """Write the documents of several prefixes one behind the other; return documents, tokens.

    Raises:
        UserError: if the files are broken, or of several tokenizers.
    """
    readers = [TokenReader(prefix) for prefix in prefixes]
    tokenizer = _same_tokenizer(prefixes, readers)
    if any(Path(f"{output}.idx").absolute() == Path(f"{one}.idx").absolute() for one in prefixes):
        raise UserError(f"output={output} is one of the inputs; choose another")
    with _Writer(output, readers[0], overwrite=overwrite) as writer:
        sources: list[dict[str, Any]] = []
        for prefix, reader in zip(prefixes, readers, strict=True):
            with Path(f"{prefix}.bin").open("rb") as file:
                while part := file.read(_COPIED_BYTES):
                    writer.add_bytes(part)
            writer.add_index(reader.lengths, np.array(reader.boundaries[:-1]))
            facts = reader.facts
            counts = {"documents": facts.documents, "tokens": facts.tokens}
            sources.append({"path": prefix, **counts})
        writer.finish(tokenizer, sources)
        return writer.documents, writer.tokens


def _same_tokenizer(
    prefixes: Sequence[str], readers: Sequence[TokenReader]
) -> TokenizerFacts | None:
    """Return the tokenizer of all; None if none of them says its own."""
    known: dict[str, TokenizerFacts] = {}
    for prefix, reader in zip(prefixes, readers, strict=True):
        manifest = read_manifest(prefix)
        if manifest is not None and manifest.tokenizer is not None:
            known[prefix] = manifest.tokenizer
        if reader.facts.dtype != readers[0].facts.dtype:
            raise UserError(
                f"{prefix} has {reader.facts.dtype} ids and {prefixes[0]} "
                f"{readers[0].facts.dtype}: they come from different tokenizers"
            )
    if not known:
        return None
    first = next(iter(known))
    for prefix, facts in known.items():
        if facts.fingerprint != known[first].fingerprint:
            raise UserError(
                f"{prefix} was made with the tokenizer {facts.path} and {first} with "
                f"{known[first].path}: their ids mean different texts; tokenize one of them again"
            )
    unknown = [prefix for prefix in prefixes if prefix not in known]
    if unknown:
        raise UserError(
            f"{', '.join(unknown)} has no manifest (.json) that names its tokenizer, and {first} "
            "has; merge files with manifests, or files without"
        )
    return known[first]


def split_by_shares(
    prefix: str, outputs: Sequence[str], shares: Sequence[float], seed: int, *, overwrite: bool
) -> list[tuple[str, int, int]]:
    """Draw documents into parts; in each they keep their order.

    Part k gets shares[k] of the documents to the nearest whole number, and none stays empty.

    Returns:
        Prefix, documents and tokens of each part.
    """
    reader = TokenReader(prefix)
    counts = _whole_counts(len(reader), shares)
    if min(counts) < 1:
        raise UserError(
            f"{prefix} has {counted(len(reader), 'document')}, too few for "
            f"shares={list(shares)}: one part would be empty"
        )
    labels = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    np.random.default_rng(seed).shuffle(labels)
    return _split(prefix, reader, outputs, labels, overwrite=overwrite)


def split_by_tokens(
    prefix: str, output: str, tokens_per_shard: int, *, overwrite: bool
) -> list[tuple[str, int, int]]:
    """Close a part with the document that fills it; parts are numbered, documents in order.

    Returns:
        Prefix, documents and tokens of each part.
    """
    reader = TokenReader(prefix)
    labels = np.empty(len(reader), np.uint32)
    label, room = 0, tokens_per_shard
    for number, length in enumerate(reader.document_lengths().tolist()):
        if room <= 0:
            label, room = label + 1, tokens_per_shard
        labels[number] = label
        room -= length
    outputs = [f"{output}-{number:05d}" for number in range(label + 1)]
    return _split(prefix, reader, outputs, labels, overwrite=overwrite)


def _whole_counts(total: int, shares: Sequence[float]) -> list[int]:
    """Round the ends of the parts, so that they add up."""
    ends = [round(total * end) for end in np.cumsum(shares)]
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _split(
    prefix: str, reader: TokenReader, outputs: Sequence[str],
    labels: NDArray[Any], *, overwrite: bool,
) -> list[tuple[str, int, int]]:  # fmt: skip
    manifest = read_manifest(prefix)
    tokenizer = manifest.tokenizer if manifest else None
    found = []
    # One part at a time: each reads the whole file, and few files are open.
    for number, output in enumerate(outputs):
        with _Writer(output, reader, overwrite=overwrite) as writer:
            for first, behind in _chunks(reader):
                _copy(reader, writer, first, labels[first:behind] == number)
            counts = {"documents": writer.documents, "tokens": writer.tokens}
            writer.finish(tokenizer, [{"path": prefix, **counts}])
            found.append((output, writer.documents, writer.tokens))
    return found


def _chunks(reader: TokenReader) -> Iterator[tuple[int, int]]:
    """Yield runs of documents that fit into memory together; a single one always does."""
    first = 0
    while first < len(reader):
        ends = np.cumsum(reader.document_lengths(first, min(first + _CHUNK, len(reader))))
        count = max(1, int(np.searchsorted(ends, _CHUNK_TOKENS, side="right")))
        yield first, first + count
        first += count


def _copy(reader: TokenReader, writer: _Writer, first: int, chosen: NDArray[np.bool]) -> None:
    """Copy the chosen ones of the documents that begin with number `first`."""
    if not chosen.any():
        return
    bounds = np.array(reader.boundaries[first : first + len(chosen) + 1])
    lengths = np.array(reader.lengths[int(bounds[0]) : int(bounds[-1])])
    chosen_sequences = np.repeat(chosen, np.diff(bounds))
    start = int(reader.offsets[int(bounds[0])]) // reader.facts.dtype.itemsize
    tokens = reader.tokens[start : start + int(lengths.sum(dtype=np.int64))]
    writer.add_bytes(tokens[np.repeat(chosen_sequences, lengths)].tobytes())
    counts = np.diff(bounds)[chosen]
    writer.add_index(lengths[chosen_sequences], np.cumsum(counts) - counts)


@dataclass(frozen=True)
class Verified:
    """What was read of a prefix.

    Attributes:
        documents: number of documents.
        tokens: number of tokens.
        faults: what is wrong, a sentence each.
        unchecked: what could not be checked, and why.
    """

    documents: int
    tokens: int
    faults: list[str]
    unchecked: list[str]


def verify_whole(prefix: str, tokenizer: TokenizerFacts | None) -> Verified:
    """Read a pair of token files from end to end.

    Args:
        prefix: of the files.
        tokenizer: that the ids should come from; None: that of the manifest.

    Raises:
        UserError: if the manifest cannot be read.
    """
    manifest = read_manifest(prefix)
    try:
        reader = TokenReader(prefix)
    except UserError as error:
        return Verified(0, 0, [str(error)], [])
    known = manifest.tokenizer if manifest else None
    faults = [*_index_faults(reader)]
    if manifest is not None:
        faults += _manifest_faults(prefix, reader, manifest)
    if tokenizer is not None and known is not None and known.fingerprint != tokenizer.fingerprint:
        faults.append(f"it was made with another tokenizer than {tokenizer.path}: {known.path}")
    facts = tokenizer or known
    if facts is not None and not faults:  # ids cannot be placed by a broken index
        faults += _id_faults(reader, facts)
    return Verified(len(reader), reader.facts.tokens, faults, list(_unchecked(manifest, facts)))


def _unchecked(manifest: Manifest | None, facts: TokenizerFacts | None) -> Iterator[str]:
    if manifest is None:
        yield "checksums: there is no manifest"
    if facts is None:
        yield "token ids: name the tokenizer, tokenizer=FOLDER"


def _manifest_faults(prefix: str, reader: TokenReader, manifest: Manifest) -> Iterator[str]:
    said = (manifest.documents, manifest.tokens, manifest.dtype)
    found = (len(reader), reader.facts.tokens, reader.facts.dtype.name)
    for name, one, other in zip(("documents", "tokens", "type of ids"), said, found, strict=True):
        if one != other:
            yield f"the manifest says {one} {name}, the index {other}"
    for suffix, expected in manifest.checksums.items():
        if checksum(Path(f"{prefix}.{suffix}")) != expected:
            yield f"{prefix}.{suffix} has another checksum than its manifest says"


def _index_faults(reader: TokenReader) -> Iterator[str]:
    """Compare offsets with lengths, and boundaries with both."""
    size, expected = reader.facts.dtype.itemsize, 0
    for start in range(0, len(reader.lengths), _CHUNK):
        lengths = np.array(reader.lengths[start : start + _CHUNK], np.int64)
        ends = expected + np.cumsum(lengths) * size
        wrong = np.flatnonzero(reader.offsets[start : start + _CHUNK] != ends - lengths * size)
        negative = np.flatnonzero(lengths < 0)
        if len(wrong) or len(negative):
            first = start + int(min([*wrong[:1], *negative[:1]]))
            yield f"the index contradicts itself at sequence {first}: offset and lengths disagree"
            return
        expected = int(ends[-1])
    steps = np.diff(reader.boundaries)
    if reader.boundaries[0] != 0 or (len(steps) and steps.min() < 0):
        yield "the index contradicts itself: documents do not follow each other"


def _id_faults(reader: TokenReader, facts: TokenizerFacts) -> Iterator[str]:
    """Compare every id with the vocabulary, and the last of every document with its end."""
    for start in range(0, reader.facts.tokens, _CHUNK_TOKENS):
        part = reader.tokens[start : start + _CHUNK_TOKENS]
        wrong = np.flatnonzero((part < 0) | (part >= facts.vocab_size))
        if len(wrong):
            place = start + int(wrong[0])
            yield (
                f"token {place} is {reader.tokens[place]}, but the vocabulary of {facts.path} ends "
                f"at {facts.vocab_size - 1}"
            )
            break
    open_ = 0
    for first in range(0, len(reader), _CHUNK):
        lengths = reader.document_lengths(first, min(first + _CHUNK, len(reader)))
        begin = int(reader.offsets[int(reader.boundaries[first])]) // reader.facts.dtype.itemsize
        ends = begin + np.cumsum(lengths)[lengths > 0] - 1  # empty documents have none
        open_ += len(lengths) - int((reader.tokens[ends] == facts.end_of_document).sum())
    if open_:
        yield f"{open_} documents do not end with the end-of-document token {facts.end_of_document}"


def histogram(lengths: NDArray[np.integer]) -> list[str]:
    """Draw how many documents have 0, 1, 2-3, 4-7, ... tokens: a line for each power of two."""
    # Bin b > 0 has the lengths from 2**(b - 1) on; log2 is exact at powers of two.
    bins = np.where(lengths > 0, 1 + np.floor(np.log2(np.maximum(lengths, 1))), 0).astype(np.int64)
    counts = np.bincount(bins)
    lines = []
    for number in range(int(bins.min()), len(counts)):
        low, high = (2**number) // 2, 2**number - 1
        bar = "#" * int(np.ceil(_BAR_WIDTH * counts[number] / counts.max()))
        lines.append(f"  {low:>10} - {high:<10} {counts[number]:>9}  {bar}")
    return lines
