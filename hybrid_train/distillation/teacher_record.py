"""Which checkpoint each teacher of a run is: chosen at its first start, and that very one ever on.

    RUN/teachers.json   [{"source": "runs/parent", "run_dir": ..., "step": 500, "checksum": ...}]

A parent that trains on meanwhile, or a folder that holds another one by now, would make another
run of it.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hybrid_train.anatomy import counts
from hybrid_train.checkpoint import layout
from hybrid_train.config import checks, frozen
from hybrid_train.config.fsspec import is_remote
from hybrid_train.config.secrets import masked
from hybrid_train.data import record as data_record
from hybrid_train.data.any_tokenizer import AnyTokenizer, has_vocabulary, open_tokenizer
from hybrid_train.distillation.target_folder import read_header
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.objective import SELF, Distill, MtpTarget, WeighedTeacher
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted

FILE_NAME = "teachers.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenTeacher:
    """The checkpoint that a teacher is.

    Attributes:
        source: what the command calls it.
        run_dir: the run folder that it is of.
        step: of the checkpoint.
        checksum: of its files.
    """

    source: str
    run_dir: str
    step: int
    checksum: str

    @property
    def found(self) -> layout.Found:
        """The checkpoint, which may be gone by now."""
        return layout.Found(layout.path_of(Path(self.run_dir), self.step), self.step)

    @property
    def is_here(self) -> bool:
        """Whether this very checkpoint is there still."""
        place = self.found.path
        is_whole = (place / layout.POSITION).is_file()
        return is_whole and layout.digest_of(place) == self.checksum


def weighed(settings: Distill) -> list[WeighedTeacher]:
    """Return the teachers that count, with weights that sum to 1; none where targets are stored."""
    named = list(settings.teachers)
    if settings.teacher is not None:
        named = [WeighedTeacher(checkpoint=settings.teacher)]
    total = sum(one.weight for one in named)
    return [
        WeighedTeacher(checkpoint=one.checkpoint, weight=one.weight / total)
        for one in named
        if one.weight
    ]


def places(job: TrainJob) -> list[tuple[str, str]]:
    """Return, of each teacher that counts, the setting that says where it is, and what it says."""
    settings = job.objective
    if not isinstance(settings, Distill):
        return []
    named = [
        (f"objective.teachers.{number}.checkpoint", one.checkpoint)
        for number, one in enumerate(settings.teachers)
        if one.weight
    ]
    if settings.teacher is not None:
        named = [("objective.teacher", settings.teacher)]
    start = ("checkpoint.load", job.checkpoint.load or "")
    return [start if place == SELF else (setting, place) for setting, place in named]


def choose(
    job: TrainJob, *, goes_on: bool, fetched: Mapping[str, Path] | None = None
) -> list[ChosenTeacher]:
    """Find the teachers of a run, before anything of it is written.

    Args:
        job: the run.
        goes_on: whether it goes on from a checkpoint of its own.
        fetched: where on this machine is what lies behind URLs.

    Raises:
        UserError: if one is not there, or is not the one that the run began with.
    """
    settings = job.objective
    if not isinstance(settings, Distill):
        return []
    if settings.targets is not None:
        return [_stored(Path(settings.targets), job, goes_on=goes_on)]
    here = [(fetched or {}).get(place, place) for _, place in places(job)]
    named = list(zip((one.checkpoint for one in weighed(settings)), here, strict=True))
    if goes_on:
        return list(_as_recorded(Path(job.run_dir), named))
    return [_found(*one) for one in named]


def _stored(folder: Path, job: TrainJob, *, goes_on: bool) -> ChosenTeacher:
    """Find the teacher whose targets are stored; its own folder may be gone.

    Raises:
        UserError: if there are no targets, or a run that goes on learned from another teacher.
    """
    teacher = ChosenTeacher(**read_header(folder).teacher)
    recorded = (read_record(Path(job.run_dir)) or []) if goes_on else [teacher]
    if [one.checksum for one in recorded] != [teacher.checksum]:
        raise UserError(
            f"objective.targets={folder} was written by {teacher.source}, step {teacher.step}; "
            f"{job.run_dir} has learned from another teacher so far: bring its targets back, or "
            "start another run"
        )
    return teacher


def _found(source: str, place: str | Path) -> ChosenTeacher:
    if is_remote(str(place)):
        raise UserError(
            f"teacher {masked(str(place))} lies behind a URL, and is fetched when a run begins"
        )
    found = layout.locate(Path(place))
    return ChosenTeacher(
        masked(source), str(found.run_dir), found.step, layout.digest_of(found.path)
    )


def _as_recorded(run_dir: Path, named: Sequence[tuple[str, str | Path]]) -> Iterator[ChosenTeacher]:
    """Yield the teachers that a run began with, from where they are by now.

    Args:
        run_dir: of the run.
        named: what its settings call them, and where that is.

    Raises:
        UserError: if one is another one by now, or nobody knows which it was.
    """
    recorded = read_record(run_dir)
    if recorded is None:
        raise UserError(
            f"{run_dir / FILE_NAME} is missing: nobody knows which checkpoints this run has "
            "learned from; bring it back, or start another run"
        )
    for number, one in enumerate(recorded):
        moved = _moved(one, *named[number]) if number < len(named) else None
        place = one.found.path
        if moved is not None:
            if moved.run_dir != one.run_dir:
                _log.info(
                    "teacher %s: %s is the very checkpoint that this run learned from in %s",
                    *(one.source, moved.found.path, one.run_dir),
                )
            yield moved
        elif not (place / layout.POSITION).is_file():
            raise UserError(
                f"teacher {one.source}: the run learned from {place}, which is gone; bring it back "
                "(checkpoint.keep of the teacher's run says how many stay), or name the folder "
                "that it is in by now: objective.teacher=FOLDER"
            )
        elif not one.is_here:
            raise UserError(
                f"teacher {one.source}: {place} is another checkpoint than the one that this run "
                f"learned from (checksum {one.checksum[:12]}); bring that one back, or start "
                "another run"
            )
        else:
            yield one


def _moved(one: ChosenTeacher, source: str, place: str | Path) -> ChosenTeacher | None:
    """Return a recorded teacher as it is called and lies by now; None if it is not there."""
    if is_remote(str(place)):
        return None
    run_dir = str(Path(frozen.run_of(str(place))).absolute())
    found = replace(one, source=masked(source), run_dir=run_dir)
    return found if found.is_here else None


def only_moved(saved: TrainJob, job: TrainJob, run_dir: Path) -> bool:
    """Tell whether the teachers of two configs of a run are the same ones in other places.

    Args:
        saved: the config in its folder.
        job: that with which it is to go on.
        run_dir: the folder.
    """
    one, other = saved.objective, job.objective
    recorded, named = read_record(run_dir), places(job)
    if not isinstance(one, Distill) or not isinstance(other, Distill) or recorded is None:
        return False
    weights = [[each.weight for each in weighed(settings)] for settings in (one, other)]
    if weights[0] != weights[1] or not len(named) == len(recorded) == len(weights[0]):
        return False
    pairs = zip(recorded, named, strict=True)
    return all(_moved(mine, setting, place) for mine, (setting, place) in pairs)


def read_record(run_dir: Path) -> list[ChosenTeacher] | None:
    """Read the record of a run; None if it has none.

    Raises:
        UserError: if the file is damaged.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [
            ChosenTeacher(
                str(one["source"]), str(one["run_dir"]), int(one["step"]), str(one["checksum"])
            )
            for one in found
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); bring it back") from error


def write_record(run_dir: Path, chosen: Sequence[ChosenTeacher]) -> None:
    """Write the record of a run, if it has teachers; a reader never sees half of it."""
    target = run_dir / FILE_NAME
    if not chosen:
        target.unlink(missing_ok=True)  # of a run whose folder this one took over
        return
    half = run_dir / f"{FILE_NAME}.tmp"
    half.write_text(json.dumps([asdict(one) for one in chosen], indent=2) + "\n", encoding="utf-8")
    half.replace(target)


def forward_flops(chosen: Sequence[ChosenTeacher], job: TrainJob, rows: int) -> int:
    """Count what teachers compute of a token ahead of a student; 0 where targets are stored.

    Args:
        chosen: the teachers.
        job: of the run, or of one phase.
        rows: of the student's embedding, padding included.
    """
    settings, found = job.objective, 0
    if not isinstance(settings, Distill) or settings.targets is not None:
        return found
    wanted = parse(job.model.pattern).mtp_depths * (settings.mtp is MtpTarget.divergence)
    for one in chosen:
        model = frozen.load(Path(one.run_dir)).model
        own = model.vocab_size and padded_vocab_size(model.vocab_size, model.vocab_multiple)
        found += counts.forward_flops(
            *(model, own or rows, job.train.sequence_length),
            heads=1 + wanted,
            with_mtp=wanted > 0,
        )
    return found


def require_usable(
    chosen: Sequence[ChosenTeacher],
    jobs: Sequence[TrainJob],
    tokenizer: AnyTokenizer,
    processes: int,
) -> None:
    """Refuse teachers that a run cannot learn from: of other tokens, or whole where it is split.

    Args:
        chosen: the teachers.
        jobs: of the run, one for each phase, with its vocabulary.
        tokenizer: of its data.
        processes: that it has.

    Raises:
        UserError: naming the teacher; on all processes.
    """
    settings = jobs[0].objective
    if isinstance(settings, Distill) and settings.targets is not None:
        return  # it is not loaded; `targets.Targets.require_fits` compares what it has left
    for one in chosen:
        _require_same_tokens(one, jobs[0], tokenizer)
        for job in jobs:
            _require_split(one, job, processes)


def _require_same_tokens(one: ChosenTeacher, job: TrainJob, tokenizer: AnyTokenizer) -> None:
    """Refuse a teacher of other tokens, or without a depth that the run wants to learn."""
    if _tokenizer_of(one) != tokenizer.fingerprint:
        raise _refused(
            f"teacher {one.source} ({one.run_dir}) has another tokenizer than the data of this "
            "run; a divergence can only be taken where tokens are the same tokens: choose a "
            "teacher of this tokenizer, or data that the teacher's made"
        )
    model, own = frozen.load(Path(one.run_dir)).model, job.model
    assert own.vocab_size is not None, "a run has a vocabulary"
    # Rows of a larger one are padding that its file has: with one tokenizer they are no tokens.
    if model.vocab_size is not None and model.vocab_size < own.vocab_size:
        raise _refused(
            f"teacher {one.source} has a vocabulary of {model.vocab_size} tokens, the model of "
            f"this run one of {own.vocab_size}, of which it says nothing; set "
            f"model.vocab_size={model.vocab_size}"
        )
    _require_depths(one, parse(model.pattern).mtp_depths, job)
    _require_layers(one, len(parse(model.pattern).main), job)


def _require_split(one: ChosenTeacher, job: TrainJob, processes: int) -> None:
    """Refuse a layout of the run that a teacher, which has its processes, cannot be split into."""
    teacher = frozen.load(Path(one.run_dir))
    teacher.model.pattern = teacher.model.pattern.replace("|", "")
    has_experts = "E" in teacher.model.pattern
    teacher.parallel = replace(job.parallel, expert=job.parallel.expert if has_experts else 1)
    teacher.runtime = job.runtime
    if problems := list(checks.split_problems(teacher, processes)):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise _refused(
            f"teacher {one.source} has the layout of this run, and cannot be split so:\n{lines}"
        )


def _tokenizer_of(one: ChosenTeacher) -> str:
    """Return the fingerprint of a teacher's tokenizer.

    Raises:
        UserError: if it has none.
    """
    run_dir = Path(one.run_dir)
    recorded = data_record.read_record(run_dir)
    if recorded is not None:
        return str(recorded["tokenizer"])
    if has_vocabulary(run_dir / layout.TOKENIZER):
        return open_tokenizer(run_dir / layout.TOKENIZER).fingerprint
    raise _refused(
        f"teacher {one.source} ({run_dir}) has no tokenizer that could be compared with that of "
        "the data; import it again with tokenizer=FOLDER"
    )


def _require_layers(one: ChosenTeacher, layers: int, job: TrainJob) -> None:
    settings = job.objective
    assert isinstance(settings, Distill), "it has teachers"
    highest = max(settings.hidden.pairs.values(), default=0)
    if highest > layers:
        raise _refused(
            f"objective.hidden names layer {highest} of teacher {one.source}, which has "
            f"{counted(layers, 'layer')}; set objective.hidden.teacher_layers"
        )


def _require_depths(one: ChosenTeacher, depths: int, job: TrainJob) -> None:
    settings, wanted = job.objective, parse(job.model.pattern).mtp_depths
    assert isinstance(settings, Distill), "it has teachers"
    if settings.mtp is MtpTarget.divergence and depths < wanted:
        raise _refused(
            f"teacher {one.source} has {counted(depths, 'MTP depth')}, the model of this run "
            f"{wanted}; choose objective.mtp=cross_entropy or objective.mtp=off"
        )


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process reads the same files
    return error
