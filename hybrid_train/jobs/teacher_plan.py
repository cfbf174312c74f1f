"""What a run with teachers takes beside its student: memory, operations, room for stored targets.

`check` says it, of config and files alone; it needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_train.anatomy import counts
from hybrid_train.config import frozen
from hybrid_train.distillation import teacher_record
from hybrid_train.distillation.target_folder import (
    Header,
    bytes_of_head,
    bytes_of_rows,
    bytes_per_token,
    parts_of,
    read_header,
)
from hybrid_train.distillation.teacher_record import ChosenTeacher
from hybrid_train.planning import degrees, stages
from hybrid_train.planning.memory import memory
from hybrid_train.planning.phases import PhaseSpan
from hybrid_train.schema.data import Quickstart, Split, named_sources
from hybrid_train.schema.objective import Distill, MtpTarget
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob

_TOP_K = 64  # where the objective names no other number


@dataclass(frozen=True)
class TeacherMemory:
    """What the fullest process keeps of a teacher, in the first phase.

    Attributes:
        source: what the command calls it.
        weights: bytes; frozen, with neither gradients nor an optimizer.
        slots: bytes of the hidden states of a step, which the last pipeline rank keeps.
    """

    source: str
    weights: int
    slots: int


@dataclass(frozen=True)
class StoredKind:
    """One kind of stored targets of a whole run.

    Attributes:
        dtype: of hidden states, or of logits.
        top_k: tokens that are told apart; None: hidden states.
        mtp_depths: whose hidden states are stored, too.
        bytes: of all files, without the table of names that each begins with.
        flops: that the teacher takes for all rows.
    """

    dtype: str
    top_k: int | None
    mtp_depths: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class StorableTargets:
    """What `distill_targets` would write for a run.

    Attributes:
        rows: of training, and as many of each validation as are asked for.
        tokens: of these.
        kinds: that the objective can read.
    """

    rows: int
    tokens: int
    kinds: Sequence[StoredKind]


@dataclass(frozen=True)
class ReadTargets:
    """The stored targets that a run reads.

    Attributes:
        folder: as the command calls it.
        header: what it says of itself.
        bytes: of all its files.
    """

    folder: str
    header: Header
    bytes: int


@dataclass(frozen=True)
class TeacherPlan:
    """All of it; a run without teachers has nothing of it.

    Attributes:
        teachers: that run ahead.
        flops: of all teachers for a token, in each phase.
        storable: what could be stored in place of one teacher; None where nothing could.
        read: what is stored already; None: the run does not read any.
        unknown: why nothing is known, as of a teacher on another machine; empty: it is.
    """

    teachers: Sequence[TeacherMemory] = ()
    flops: Sequence[int] = ()
    storable: StorableTargets | None = None
    read: ReadTargets | None = None
    unknown: str = ""


def plan_teachers(
    job: TrainJob, phases: Sequence[PhaseSpan], rows: int, processes: int
) -> TeacherPlan:
    """Count what teachers take.

    Args:
        job: the run.
        phases: as it is laid out.
        rows: of its embedding as they are stored.
        processes: that it has.
    """
    settings = job.objective
    nothing = [0] * len(phases)
    if not isinstance(settings, Distill):
        return TeacherPlan(flops=nothing)
    try:
        if settings.targets is not None:
            return TeacherPlan(flops=nothing, read=_read(settings.targets))
        chosen = teacher_record.choose(job, goes_on=False)
        return TeacherPlan(
            [_memory(one, phases[0].job, rows, processes) for one in chosen],
            [teacher_record.forward_flops(chosen, one.job, rows) for one in phases],
            _storable(chosen[0], phases, rows) if len(chosen) == 1 else None,
        )
    except UserError as error:
        return TeacherPlan(flops=nothing, unknown=str(error))


def _read(folder: str) -> ReadTargets:
    header = read_header(Path(folder))
    files = (one for one in Path(folder).rglob("*") if one.is_file())
    return ReadTargets(folder, header, sum(one.stat().st_size for one in files))


def _memory(one: ChosenTeacher, student: TrainJob, rows: int, processes: int) -> TeacherMemory:
    settings, teacher = student.objective, frozen.load(Path(one.run_dir))
    assert isinstance(settings, Distill), "it has teachers"
    base = _base(settings, teacher)
    experts = student.parallel.expert if "E" in teacher.model.pattern else 1
    teacher.precision = Precision(format=base)
    # Each process keeps the whole of its part, also where FSDP splits the student's.
    teacher.parallel = replace(student.parallel, expert=experts, fsdp=False)
    teacher.model.pattern = teacher.model.pattern.replace("|", "")
    cut = stages.stages(teacher, _rows(teacher, rows))
    ranks = range(teacher.parallel.pipeline)
    kept = (memory(teacher, stages.held_of_rank(cut, rank), processes) for rank in ranks)
    number = degrees.num_microbatches(student, processes) * _tokens_of_microbatch(student)
    depths = (settings.mtp is MtpTarget.divergence) * parse(student.model.pattern).mtp_depths
    width = (1 + depths) * teacher.model.hidden_size * (4 if base is GemmFormat.fp32 else 2)
    return TeacherMemory(one.source, max(each.weights for each in kept), width * number)


def _base(settings: Distill, teacher: TrainJob) -> GemmFormat:
    """Return what the weights of a teacher are held in."""
    return settings.teacher_format or GemmFormat(teacher.precision.base.value)


def _rows(teacher: TrainJob, rows: int) -> int:
    """Return the rows of a teacher's embedding; those of the student where it names no size."""
    size = teacher.model.vocab_size
    return degrees.padded_vocab_size(size, teacher.model.vocab_multiple) if size else rows


def _tokens_of_microbatch(job: TrainJob) -> int:
    """Return the tokens of which a process has hidden states between layers."""
    train, parallel = job.train, job.parallel
    ways = parallel.context * (parallel.tensor if degrees.splits_sequence(parallel) else 1)
    return train.microbatch * train.sequence_length // ways


def _storable(one: ChosenTeacher, phases: Sequence[PhaseSpan], rows: int) -> StorableTargets | None:
    """Count what the targets of a teacher would take; hidden states of layers are not stored."""
    settings = phases[0].job.objective
    assert isinstance(settings, Distill), "it has teachers"
    if settings.hidden.layers:
        return None
    laid_out = [part for part, _ in parts_of(phases, _held_out, 1)]
    tokens = sum(part.rows * part.length for part in laid_out)
    kinds = []
    for top_k, dtype, depths in _kinds(settings, frozen.load(Path(one.run_dir))):
        teacher = frozen.load(Path(one.run_dir))
        model, of_head = teacher.model, _rows(teacher, rows)
        width = bytes_per_token(model.hidden_size, dtype, mtp_depths=depths, top_k=top_k)
        size = sum(bytes_of_rows(part.rows, part.length, width) for part in laid_out)
        if top_k is None:
            vocabulary = model.vocab_size or of_head
            size += bytes_of_head(vocabulary, model.hidden_size, dtype)
        flops = sum(
            part.rows
            * part.length
            * counts.forward_flops(
                *(model, of_head, part.length),
                heads=0 if top_k is None else 1,
                with_mtp=depths > 0,
            )
            for part in laid_out
        )
        kinds.append(StoredKind(dtype, top_k, depths, size, flops))
    return StorableTargets(sum(part.rows for part in laid_out), tokens, kinds)


def _kinds(settings: Distill, teacher: TrainJob) -> Iterator[tuple[int | None, str, int]]:
    """Yield top_k, format and MTP depths of each kind that the objective can read."""
    wanted = settings.mtp is MtpTarget.divergence
    depths = parse(teacher.model.pattern).mtp_depths if wanted else 0
    yield None, "float32" if _base(settings, teacher) is GemmFormat.fp32 else "bfloat16", depths
    if settings.temperature == 1:
        yield settings.top_k or _TOP_K, "float32", 0


def _held_out(phase: PhaseSpan) -> int:
    """Return how many rows a validation asks for; a short one has fewer."""
    data, train = phase.job.data, phase.job.train
    sources = named_sources(data).values()
    if isinstance(data, Quickstart) or any(one.has(Split.validation) for one in sources):
        return train.validation_batches * train.global_batch
    return 0
