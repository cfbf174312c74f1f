"""The jobs `data count`, `inspect`, `merge`, `split` and `verify`, on token files."""

import sys
from pathlib import Path

from hybrid_train.data.any_tokenizer import AnyTokenizer, open_tokenizer
from hybrid_train.data.prepare.finished import (
    histogram,
    merge,
    split_by_shares,
    split_by_tokens,
    verify_whole,
)
from hybrid_train.data.prepare.inputs import find_prefixes
from hybrid_train.data.prepare.manifest import TokenizerFacts, read_manifest
from hybrid_train.data.token_files import TokenFile, TokenReader, verify
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.schema.names import listed_paths
from hybrid_train.schema.prepare import (
    CountTokensJob,
    InspectJob,
    MergeJob,
    SplitJob,
    VerifyTokensJob,
)
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_bytes, show_tokens, tokens

_COUNT_HEADS = ("prefix", "documents", "tokens", "size", "ids", "tokenizer")
_FINGERPRINT = 12  # characters; enough to tell tokenizers apart


def run_count(job: CountTokensJob) -> None:
    """Print a row for each prefix, and their sum."""
    found = [verify(prefix) for prefix in find_prefixes(listed_paths(job.input))]
    rows = [_count_row(one) for one in found]
    documents, tokens = sum(one.documents for one in found), sum(one.tokens for one in found)
    size = sum(one.tokens * one.dtype.itemsize for one in found)
    total = ("total", f"{documents:,}", f"{tokens:,}", show_bytes(size), "", "")
    show_numbers(console(), [*rows, total] if len(rows) > 1 else rows, _COUNT_HEADS)


def _count_row(one: TokenFile) -> tuple[str, ...]:
    manifest = read_manifest(one.prefix)
    known = manifest.tokenizer if manifest else None
    return (
        one.prefix, f"{one.documents:,}", f"{one.tokens:,}",
        show_bytes(one.tokens * one.dtype.itemsize), one.dtype.name,
        known.fingerprint[:_FINGERPRINT] if known else "unknown",
    )  # fmt: skip


def run_inspect(job: InspectJob) -> None:
    """Print what the files hold.

    Raises:
        UserError: if they are broken, or have no document of this number.
    """
    for prefix in find_prefixes(listed_paths(job.input)):
        _inspect(prefix, job.tokenizer, job.document)


def _inspect(prefix: str, folder: str | None, number: int | None) -> None:
    tokenizer = _tokenizer(prefix, folder)
    found = verify(prefix, tokenizer.vocab_size if tokenizer else None)
    reader = TokenReader(prefix)
    page = console()
    page.print(f"{prefix}: {found.tokens} tokens ({show_tokens(found.tokens)}) of {found.dtype}")
    page.print(f"{counted(len(reader), 'document')}; tokens in each:")
    page.print("\n".join(histogram(reader.document_lengths())), soft_wrap=True)
    if number is None:
        return
    if number >= len(reader):
        raise UserError(f"{prefix} has no document {number}; they go from 0 to {len(reader) - 1}")
    ids = reader[number].tolist()
    page.print(f"\ndocument {number}, {counted(len(ids), 'token')}:")
    page.print(tokenizer.decode(ids) if tokenizer else str(ids), soft_wrap=True)


def _tokenizer(prefix: str, folder: str | None) -> AnyTokenizer | None:
    """Open the tokenizer that is named; else that of the manifest, if it is still the same."""
    if folder is not None:
        return open_tokenizer(folder)
    manifest = read_manifest(prefix)
    known = manifest.tokenizer if manifest else None
    if known is None or not Path(known.path).exists():
        return None
    found = open_tokenizer(known.path)
    return found if found.fingerprint == known.fingerprint else None


def run_merge(job: MergeJob) -> None:
    """Merge, and say how much it is."""
    prefixes = find_prefixes(listed_paths(job.input))
    documents, tokens = merge(prefixes, job.output, overwrite=job.overwrite)
    sys.stdout.write(
        f"{job.output}: {counted(documents, 'document')}, {show_tokens(tokens)} tokens of "
        f"{counted(len(prefixes), 'prefix')}\n"
    )


def run_split(job: SplitJob) -> None:
    """Split, and show the parts.

    Raises:
        UserError: if the input is not one prefix.
    """
    prefix, *more = find_prefixes(listed_paths(job.input))
    if more:
        raise UserError(
            f"input={','.join(job.input)} names {1 + len(more)} prefixes, {prefix} and {more[0]} "
            "among them; split takes one: merge first"
        )
    if job.tokens_per_shard is not None:
        size = tokens(job.tokens_per_shard)
        parts = split_by_tokens(prefix, job.output, size, overwrite=job.overwrite)
    else:
        names = job.names or [f"{number:05d}" for number in range(len(job.shares))]
        outputs = [f"{job.output}-{name}" for name in names]
        parts = split_by_shares(prefix, outputs, job.shares, job.seed, overwrite=job.overwrite)
    rows = [(name, f"{documents:,}", f"{count:,}") for name, documents, count in parts]
    show_numbers(console(), rows, ("prefix", "documents", "tokens"))


def run_verify(job: VerifyTokensJob) -> None:
    """Verify each prefix and say what was found.

    Raises:
        UserError: with every fault.
    """
    facts = None
    if job.tokenizer is not None:
        facts = TokenizerFacts.of(job.tokenizer, open_tokenizer(job.tokenizer))
    faults = []
    for prefix in find_prefixes(listed_paths(job.input)):
        found = verify_whole(prefix, facts)
        faults += [f"  {prefix}: {fault}" for fault in found.faults]
        state = "faulty" if found.faults else "whole"
        size = f"{counted(found.documents, 'document')}, {show_tokens(found.tokens)} tokens"
        sys.stdout.write(f"{prefix}: {state}, {size}\n")
        for unchecked in found.unchecked:
            sys.stdout.write(f"  not checked: {unchecked}\n")
    if faults:
        text = "\n".join(faults)
        many = counted(len(faults), "fault")
        raise UserError(f"{many} in token files:\n{text}\nWrite these files anew")
