"""The job `lineage`: what the weights of a folder come from, as a tree."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.lineage import FILE_NAME, Lineage, Parent, Record, read
from hybrid_train.schema.job_roots import LineageJob
from hybrid_train.schema.problems import UserError


def run(job: LineageJob) -> None:
    """Print how a folder was made, and below it each of its parents.

    Raises:
        UserError: if the folder says nothing of it.
    """
    folder = Path(job.run_dir)
    found = read(folder)
    if found is None:
        there = f"has no {FILE_NAME}" if folder.is_dir() else "is not there"
        raise UserError(
            f"run_dir = {folder}: {there}; a run folder gets one when it begins, since "
            "30 November 2026, and so do imported, pruned and exported folders"
        )
    print("\n".join(lines(found, job.run_dir)))  # noqa: T201  the result of the command


def lines(lineage: Lineage, name: str) -> Iterator[str]:
    """Yield lines that tell where a folder comes from, parents below it, further in."""
    yield f"{name}: {_made_in_words(lineage.record)}"
    yield from _parents(lineage.record, lineage.ancestors, "  ", set())


def _parents(
    record: Record, ancestors: Mapping[str, Record], margin: str, seen: set[str]
) -> Iterator[str]:
    for one in record.parents:
        known = ancestors.get(one.checksum)
        step = "" if one.step is None else f", step {one.step}"
        line = f"{margin}{one.role}: {one.folder}{step}, checksum {one.checksum[:12]}{_now(one)}"
        if known is None:
            yield f"{line}: nothing is known of how it was made"
        elif one.checksum in seen:
            yield f"{line}: as above"
        else:
            seen.add(one.checksum)
            yield f"{line}: {_made_in_words(known)}"
            yield from _parents(known, ancestors, f"{margin}  ", seen)


def _made_in_words(record: Record) -> str:
    made, commit = record.made, record.made.code.get("commit")
    code = f"{made.code.get('version')}{f', {commit[:8]}' if commit else ''}"
    config = f", config {record.config[:12]}" if record.config else ""
    return f"{made.command} (hybrid_train {code}{config})"


def _now(one: Parent) -> str:
    """Say what became of a parent, if it is not as it was."""
    if not one.place.is_dir():
        return ", which is gone"
    return "" if layout.digest_of(one.place) == one.checksum else ", which is another one by now"
