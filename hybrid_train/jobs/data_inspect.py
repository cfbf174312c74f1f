"""The job `data inspect`: lengths of the documents of a prefix, and one of them as text."""

from pathlib import Path

from hybrid_train.data.any_tokenizer import AnyTokenizer, open_tokenizer
from hybrid_train.data.indexed import verify
from hybrid_train.data.prepare.lengths import histogram
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.data.prepare.prefixes import find_prefixes
from hybrid_train.data.token_files import TokenReader
from hybrid_train.jobs.help import console
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.prepare import InspectJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_tokens


def run(job: InspectJob) -> None:
    """Print what the files hold.

    Raises:
        UserError: if they are broken, or have no document of this number.
    """
    for prefix in find_prefixes(listed_paths(job.input)):
        _show(prefix, job.tokenizer, job.document)


def _show(prefix: str, folder: str | None, number: int | None) -> None:
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
