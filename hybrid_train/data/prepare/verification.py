"""Token files read whole: against their manifest, their index and their vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid_train.data.prepare.manifest import Manifest, TokenizerFacts, read_manifest
from hybrid_train.data.token_files import TokenReader, checksum
from hybrid_train.schema.problems import UserError

_STRETCH = 2**20  # sequences
_STRETCH_TOKENS = 2**23


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
    for start in range(0, len(reader.lengths), _STRETCH):
        lengths = np.array(reader.lengths[start : start + _STRETCH], np.int64)
        ends = expected + np.cumsum(lengths) * size
        wrong = np.flatnonzero(reader.offsets[start : start + _STRETCH] != ends - lengths * size)
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
    for start in range(0, reader.facts.tokens, _STRETCH_TOKENS):
        part = reader.tokens[start : start + _STRETCH_TOKENS]
        wrong = np.flatnonzero((part < 0) | (part >= facts.vocab_size))
        if len(wrong):
            place = start + int(wrong[0])
            yield (
                f"token {place} is {reader.tokens[place]}, but the vocabulary of {facts.path} ends "
                f"at {facts.vocab_size - 1}"
            )
            break
    open_ = 0
    for first in range(0, len(reader), _STRETCH):
        lengths = reader.document_lengths(first, min(first + _STRETCH, len(reader)))
        begin = int(reader.offsets[int(reader.boundaries[first])]) // reader.facts.dtype.itemsize
        ends = begin + np.cumsum(lengths)[lengths > 0] - 1  # empty documents have none
        open_ += len(lengths) - int((reader.tokens[ends] == facts.end_of_document).sum())
    if open_:
        yield f"{open_} documents do not end with the end-of-document token {facts.end_of_document}"
