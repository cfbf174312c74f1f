"""The job `distill_targets`: runs a teacher over the rows of a run once, and keeps what it says."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_train.checkpoint import layout
from hybrid_train.data.record import record_of
from hybrid_train.data.run_data import RunData, open_data
from hybrid_train.jobs.text_progress import TextProgress
from hybrid_train.planning.phases import PhaseSpan, lay_out
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema.data import Split
from hybrid_train.schema.extension import built_from
from hybrid_train.schema.job_roots import DistillTargetsJob, TargetKind, WeightFormat
from hybrid_train.schema.objective import Distill, MtpTarget
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError

if TYPE_CHECKING:
    from hybrid_train.distillation.target_writer import PartRows
    from hybrid_train.distillation.targets import Header
    from hybrid_train.jobs.networks import LoadedModel

_FILE_BYTES = 256 * 2**20  # at most, unless a row has more
_FILES, _LEAST_ROWS = 64, 16  # of a part, about: a short one is shared by ranks, and resumed, too
_log = logging.getLogger(__name__)


def run(job: DistillTargetsJob) -> None:
    """Write the targets of all rows of a run; what is there already is not written again.

    Raises:
        UserError: if the teacher has another tokenizer than the data, or see `TargetWriter.write`.
    """
    with process(job.runtime, job.train.seed):
        from hybrid_train.distillation.target_writer import TargetWriter  # they need the process
        from hybrid_train.distillation.teachers import Teacher
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            data, phases = _open(job), lay_out(job)
            assert isinstance(job.objective, Distill), "the settings were checked"
            teacher = load_model(
                _teacher_of(job), job.runtime, parallel=job.parallel,
                format=job.objective.teacher_format,
            )  # fmt: skip
            parts = list(_parts(job, data, phases, teacher))
            header, folder = _header(job, data, teacher, parts), Path(job.output)
            said = Teacher(_teacher_of(job), 1.0, teacher.network)
            wrote = TargetWriter(folder, header, said, parts).write()
            if ranks.is_main():
                rows = sum(one.part.rows for one in parts)
                state = "are in" if wrote else "were in"
                print(  # noqa: T201  the result of the command
                    f"targets of {rows:,} rows {state} {folder}{'' if wrote else ' already'}: "
                    f"objective.targets={folder}"
                )
        finally:
            destroy_groups()


def _open(job: DistillTargetsJob) -> RunData:
    with TextProgress(terminal=sys.stderr.isatty()) as shown:
        return open_data(
            job.data,
            lay_out(job),
            built_from(job.row_transforms),
            barrier=ranks.barrier,
            is_main=ranks.is_main(),
            report=shown.update,
        )


def _teacher_of(job: DistillTargetsJob) -> str:
    """Return the checkpoint that the settings name."""
    assert isinstance(job.objective, Distill)
    teacher = job.objective.teacher
    assert teacher is not None, "the settings were checked"
    if teacher != "self":
        return teacher
    if job.checkpoint.load is None:
        raise UserError(
            "objective.teacher=self: the weights that the run starts from are those of "
            "checkpoint.load, which names none"
        )
    return job.checkpoint.load


def _parts(
    job: DistillTargetsJob, data: RunData, phases: list[PhaseSpan], teacher: "LoadedModel"
) -> Iterator["PartRows"]:
    """Yield the rows of each phase and of each kind of validation."""
    from hybrid_train.distillation.target_writer import PartRows, bytes_per_token
    from hybrid_train.distillation.targets import Part

    width = bytes_per_token(_header(job, data, teacher, []), teacher.job.model.hidden_size)
    seen = set()
    for phase in phases:
        train, number = phase.job.train, phase.number
        length = train.sequence_length
        rows = phase.length.sequences
        size = max(1, min(_FILE_BYTES // (width * length), max(_LEAST_ROWS, rows // _FILES)))
        part = Part(f"train-{number}", Split.train.value, length, phase.start, rows, size)
        yield PartRows(part, data.rows(phase), train.microbatch)
        held_out = data.held_out_length(phase)
        if not held_out or (length, held_out) in seen:
            continue
        seen.add((length, held_out))
        part = Part(f"validation-{number}", Split.validation.value, length, 0, held_out, size)
        yield PartRows(part, data.held_out_rows(phase), train.microbatch)


def _header(
    job: DistillTargetsJob, data: RunData, teacher: "LoadedModel", parts: "list[PartRows]"
) -> "Header":
    """Say what the folder will hold.

    Raises:
        UserError: if the teacher has another tokenizer than the data.
    """
    from hybrid_train.distillation.targets import HIDDEN, Header

    found = layout.locate(Path(_teacher_of(job)))
    if teacher.tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"objective.teacher={found.run_dir}: has another tokenizer than the data; its tokens "
            "are not those of the run"
        )
    assert isinstance(job.objective, Distill)
    hidden = job.what is TargetKind.hidden
    kind = "float32"
    if hidden:
        own = str(next(teacher.network.chunks[0].parameters()).dtype).removeprefix("torch.")
        kind = own if job.dtype is WeightFormat.keep else job.dtype.value
    wanted = hidden and job.objective.mtp is MtpTarget.divergence
    depths = parse(teacher.job.model.pattern).mtp_depths if wanted else 0
    return Header(
        what=HIDDEN if hidden else TargetKind.top_k.value,
        top_k=None if hidden else min(job.objective.top_k or 1, teacher.network.vocab_size),
        dtype=kind,
        vocab_size=teacher.network.vocab_size,
        mtp_depths=depths,
        tokenizer=data.tokenizer.fingerprint,
        data=record_of(data),
        seed=job.train.seed,
        teacher={
            "path": str(found.path),
            "step": found.step,
            "checksum": layout.digest_of(found.path),
        },
        parts=[one.part for one in parts],
    )
