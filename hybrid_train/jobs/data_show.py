"""The jobs `data show` and `data index`: what a run reads at a step, and how it finds its rows."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hybrid_train.config import frozen
from hybrid_train.data.plan import PhasePlan
from hybrid_train.data.record import changes, read_record, record_of
from hybrid_train.data.run_data import RunData, open_data
from hybrid_train.jobs.help import console
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.planning.phases import PhaseSpan, lay_out, rows_of_step
from hybrid_train.runtime.logs import start_logging
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.job_roots import IndexJob, ShowJob
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted, show_tokens


def run_index(job: IndexJob) -> None:
    """Build the indices, and print the table of sources and phases."""
    start_logging()
    start = time.perf_counter()
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        data = open_data(
            job.data,
            lay_out(job),
            built_from(job.row_transforms),
            barrier=lambda: None,
            is_main=True,
            report=shown.update,
        )
    for line in data.description():
        print(line)  # noqa: T201  the result of the command
    kept = data.train.cache.folder_of(len(one) for one in data.train.documents.values())
    place = f"large ones are in {kept}" if kept else "none is large enough to be kept on disk"
    print(f"all indices ready after {time.perf_counter() - start:.1f} s; {place}")  # noqa: T201


def run_show(job: ShowJob) -> None:
    """Print sources, documents and texts of the rows of a step.

    Raises:
        UserError: if the run has no such step, or its data cannot be read or has changed.
    """
    start_logging()
    run_dir = Path(job.run_dir)
    trained = frozen.load(run_dir)
    phase_spans = lay_out(trained)
    found = rows_of_step(phase_spans, job.step)
    if found is None:
        last = sum(phase_span.length.steps for phase_span in phase_spans)
        raise UserError(f"{run_dir} has no step {job.step}; its steps go from 1 to {last}")
    data = open_data(
        trained.data,
        phase_spans,
        built_from(trained.row_transforms),
        barrier=lambda: None,
        is_main=True,
    )
    recorded = read_record(run_dir)
    differences = changes(recorded, record_of(data)) if recorded else []
    if differences:
        text = "\n".join(f"  {line}" for line in differences)
        raise UserError(f"the data of {run_dir} has changed since it was read:\n{text}")
    phase_span, first, last = found
    page = console()
    for line in _lines(job, data, phase_span, range(first, last)):
        page.print(line, soft_wrap=True)


def _lines(job: ShowJob, data: RunData, phase_span: PhaseSpan, rows: range) -> Iterator[str]:
    plan = data.plans[phase_span.number]
    phase = f", phase {phase_span.name}" if phase_span.name else ""
    length = phase_span.job.train.sequence_length
    seen = phase_span.start + rows.start * length
    yield (
        f"step {job.step}{phase}: {counted(len(rows), 'row')} of {length:,} tokens, after "
        f"{show_tokens(seen)} tokens"
    )
    for number, row in enumerate(rows[: job.rows]):
        yield from _row(job, data, plan, row, number)
    if len(rows) > job.rows:
        left = counted(len(rows) - job.rows, "row")
        yield f"and {left} more; rows={len(rows)} shows all"


def _row(job: ShowJob, data: RunData, plan: PhasePlan, row: int, number: int) -> Iterator[str]:
    name = plan.draws[plan.mixture.origin(row).source].source
    documents = data.train.documents[name]
    yield f"\nrow {number}: {name}"
    texts = []
    for span in plan.mixture.spans(row):
        file, document = documents.file_of(span.document)
        yield f"  {file} document {document}, tokens {span.start} to {span.stop}"
        texts.append(data.tokenizer.decode(documents.read(span).tolist()))
    text = " ".join("".join(texts).split())
    if job.characters:
        yield f"  {text[: job.characters]}{'...' if len(text) > job.characters else ''}"
