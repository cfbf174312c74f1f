"""The job `data count`: a table of documents and tokens."""

from hybrid_train.data.indexed import TokenFile, verify
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.data.prepare.prefixes import find_prefixes
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.prepare import CountTokensJob
from hybrid_train.schema.units import show_bytes

_HEADS = ("prefix", "documents", "tokens", "size", "ids", "tokenizer")
_FINGERPRINT = 12  # characters; enough to tell tokenizers apart


def run(job: CountTokensJob) -> None:
    """Print a row for each prefix, and their sum."""
    found = [verify(prefix) for prefix in find_prefixes(listed_paths(job.input))]
    rows = [_row(one) for one in found]
    documents, tokens = sum(one.documents for one in found), sum(one.tokens for one in found)
    size = sum(one.tokens * one.dtype.itemsize for one in found)
    total = ("total", f"{documents:,}", f"{tokens:,}", show_bytes(size), "", "")
    show_numbers(console(), [*rows, total] if len(rows) > 1 else rows, _HEADS)


def _row(one: TokenFile) -> tuple[str, ...]:
    manifest = read_manifest(one.prefix)
    known = manifest.tokenizer if manifest else None
    return (
        one.prefix, f"{one.documents:,}", f"{one.tokens:,}",
        show_bytes(one.tokens * one.dtype.itemsize), one.dtype.name,
        known.fingerprint[:_FINGERPRINT] if known else "unknown",
    )  # fmt: skip
