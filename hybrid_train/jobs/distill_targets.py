"""The job `distill_targets`: runs a teacher over the rows of a run once, and keeps what it says."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.data.record import record_of
from hybrid_train.data.run_data import RunData
from hybrid_train.distillation import teacher_record
from hybrid_train.distillation.target_folder import HIDDEN, Header, parts_of
from hybrid_train.distillation.teacher_record import ChosenTeacher
from hybrid_train.jobs.fetched_checkpoint import folder_of
from hybrid_train.planning.phases import lay_out
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema.job_roots import DistillTargetsJob, TargetKind, WeightFormat
from hybrid_train.schema.objective import Distill, MtpTarget
from hybrid_train.schema.pattern import parse

if TYPE_CHECKING:
    from hybrid_train.distillation.target_writer import TargetWriter
    from hybrid_train.training.network import Network


def run(job: DistillTargetsJob) -> None:
    """Write the targets of all rows of a run; what is there already is not written again.

    Raises:
        UserError: if the run could not learn from the teacher, or see `TargetWriter.write`.
    """
    with process(job.runtime, job.train.seed):
        # They need the process.
        from hybrid_train.distillation.target_writer import PartRows, TargetWriter, hidden_size_of
        from hybrid_train.distillation.teachers import Teacher
        from hybrid_train.jobs.chosen_teachers import choose_teachers
        from hybrid_train.jobs.networks import load_model
        from hybrid_train.jobs.pretraining import open_run_data
        from hybrid_train.jobs.run_start import Start
        from hybrid_train.megatron.data_parallel import destroy_groups
        from hybrid_train.megatron.hybrid import limit_vocabulary

        try:
            phases, (chosen,) = lay_out(job), choose_teachers(job, goes_on=False)
            data = open_run_data(job, phases, Start(_loaded(job.checkpoint.load)))
            jobs = [replace(one.job, parallel=job.parallel) for one in phases]
            teacher_record.require_usable([chosen], jobs, data.tokenizer, ranks.world_size())
            assert isinstance(job.objective, Distill), "the settings were checked"
            place, format = str(chosen.found.path), job.objective.teacher_format
            network = load_model(place, job.runtime, parallel=job.parallel, format=format).network
            if (known := jobs[0].model.vocab_size) is not None:
                limit_vocabulary(network.chunks, known)
            header, folder = _header(job, data, chosen, network), Path(job.output)
            parts = [
                PartRows(
                    part,
                    (data.held_out_rows if part.is_validation else data.rows)(phase),
                    phase.job.train.microbatch,
                )
                for part, phase in parts_of(
                    phases, data.held_out_length, header.width(hidden_size_of(network))
                )
            ]
            header = replace(header, parts=[one.part for one in parts])
            writer = TargetWriter(folder, header, Teacher(chosen.source, 1.0, network), parts)
            said = f"{writer.estimate()}; nothing was written" if job.dry_run else _written(writer)
            if ranks.is_main():
                print(said)  # noqa: T201  the result of the command
        finally:
            destroy_groups()


def _loaded(load: str | None) -> layout.Found | None:
    """Find the checkpoint that the student would start from; its vocabulary is that of the run."""
    return None if load is None else layout.locate(folder_of(load, "checkpoint.load"))


def _written(writer: "TargetWriter") -> str:
    """Write what is missing, and say where all is."""
    rows, found = sum(one.part.rows for one in writer.parts), "" if writer.write() else " already"
    return (
        f"targets of {rows:,} rows are in {writer.folder}{found}; a run reads them with "
        f"objective.targets={writer.folder}"
    )


def _header(
    job: DistillTargetsJob, data: RunData, chosen: ChosenTeacher, network: "Network"
) -> Header:
    """Say what the folder will hold, but for the rows."""
    from hybrid_train.distillation.target_writer import dtype_of

    assert isinstance(job.objective, Distill)
    hidden = job.what is TargetKind.hidden
    kind = "float32"
    if hidden:
        kind = dtype_of(network) if job.dtype is WeightFormat.keep else job.dtype.value
    wanted = hidden and job.objective.mtp is MtpTarget.divergence
    depths = parse(frozen.load(Path(chosen.run_dir)).model.pattern).mtp_depths if wanted else 0
    return Header(
        what=HIDDEN if hidden else TargetKind.top_k.value,
        top_k=None if hidden else min(job.objective.top_k or 1, network.vocab_size),
        dtype=kind,
        vocab_size=network.vocab_size,
        mtp_depths=depths,
        tokenizer=data.tokenizer.fingerprint,
        data=record_of(data),
        seed=job.train.seed,
        teacher=asdict(chosen),
        parts=[],
    )
