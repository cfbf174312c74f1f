"""The folder of a run: who may train in it, which run it belongs to, what may change in that."""

import contextlib
import dataclasses
import enum
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.layout import TOKENIZER
from hybrid_train.checkpoint.lineage import FILE_NAME as LINEAGE
from hybrid_train.config import frozen
from hybrid_train.config.commands import setting, typed
from hybrid_train.config.secrets import masked, masked_data
from hybrid_train.data.record import FILE_NAME as RECORD
from hybrid_train.distillation.teacher_record import FILE_NAME as TEACHERS
from hybrid_train.distillation.teacher_record import only_moved
from hybrid_train.hf import origin
from hybrid_train.planning.phases import FIXED_SETTINGS, lay_out
from hybrid_train.schema import formats
from hybrid_train.schema.model import SECTIONS, Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.pruning import MASK_RANKING
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import show_tokens
from hybrid_train.tracking import exit_reports, history
from hybrid_train.tracking.jsonl import FILE_NAME as METRICS

# What may change when a run goes on; everything else makes it another run.
_MAY_CHANGE = (
    "run_dir",
    "runtime.",
    "gpu.",
    "profile.",
    "tracking.",
    "checkpoint.",
    "recovery.",
    "parallel.",
    "train.tokens",
    "train.microbatch",
    "train.validation_",
    "evaluate.",
    "schedule.warmup_tokens",  # as a share of train.tokens, they grow with it
    "schedule.decay_tokens",
    "model.mamba.chunk_size",
    "precision.backend",
    "precision.strict",
    "precision.statistics_interval",
    "data.cache",
    "data.remote.",
    "data.warn_epochs",
    "data.accept_changes",
)
_PHASES = "train.phases"
_PATTERN = "model.pattern"
_KINDS = {f"model.{section}.": letter for letter, section in SECTIONS.items()}
_POSITIONS = "model.attention.rope."  # which long phases turn slower
_BESIDE_WEIGHTS = ("model.init_std", "model.moe.bias_update_rate", _POSITIONS)  # not seen in them
_SIGNS = {frozen.FROZEN_NAME, history.FILE_NAME}
_WRITTEN = {
    *_SIGNS, formats.FILE_NAME, exit_reports.FOLDER, layout.FOLDER, TOKENIZER, origin.FOLDER,
    METRICS, RECORD, TEACHERS, LINEAGE, MASK_RANKING, "precision.json", "tensorboard", "wandb",
    "wandb_run_id",
}  # fmt: skip
_HALVES = {
    *(f"{name}.tmp" for name in (frozen.FROZEN_NAME, formats.FILE_NAME, RECORD, TEACHERS, LINEAGE)),
    f"{METRICS}.part",
}  # fmt: skip
# What a run leaves behind before its first step, and what its submission does.
_OF_A_START = _WRITTEN | _HALVES | {"launch", "logs", "code"}
_BYTES_PER_PARAMETER = 16  # weight, float32 master, two moments
Change = tuple[str, object, object]  # a setting, its value there, its value here
_log = logging.getLogger(__name__)


_TEACHERS = ("objective.teacher", "objective.teachers")


def may_change(key: str) -> bool:
    """Tell whether a setting, or a whole group as `runtime.`, may change when a run goes on."""
    return key.startswith(_MAY_CHANGE)


def require_access(run_dir: Path) -> None:
    """Refuse a run folder in which this user may not read and write what a run needs.

    A checkpoint that cannot be seen would be taken for one that is not there.

    Raises:
        UserError: naming the file or folder.
    """
    for place in _places(run_dir):
        if not _may_use(place):
            raise UserError(
                f"run_dir = {run_dir}: this user may not read and write {place}; permit it (chmod, "
                "chown), or choose another run_dir=..."
            )


def _places(run_dir: Path) -> Iterator[Path]:
    """Yield what a run needs in its folder, a folder before what is in it."""
    yield run_dir
    yield from (run_dir / name for name in sorted(_WRITTEN))
    saved = run_dir / layout.FOLDER
    if saved.is_dir():
        yield from sorted(saved.iterdir())


def _may_use(place: Path) -> bool:
    """Tell whether a place can be read and written, if it is there; its folder was looked at."""
    if not place.exists():
        return True
    return os.access(
        place, os.R_OK | os.W_OK | (os.X_OK if place.is_dir() else 0), effective_ids=True
    )


def require_readable(run_dir: Path) -> None:
    """Refuse a run folder, or one with checkpoints, of a format that this version does not read.

    Raises:
        UserError: naming who wrote it, and what to do.
    """
    formats.require_readable_folder(run_dir, formats.RUN_FOLDER)
    for found in layout.complete(run_dir):
        found.require_readable()


def is_untrained(run_dir: Path) -> bool:
    """Tell whether a folder holds what a run leaves at its start, and nothing that it learned."""
    saved = run_dir / layout.FOLDER
    learned = any(not one.name.endswith(layout.PARTIAL) for one in saved.glob("*"))
    metrics = run_dir / METRICS
    steps = metrics.is_file() and b"\n" in metrics.read_bytes()
    names = {one.name for one in run_dir.iterdir()}
    return not (learned or steps) and names <= _OF_A_START and bool(names & _SIGNS)


def take_over(job: TrainJob) -> None:
    """Make an untrained folder that of this run; the history keeps what its config was."""
    run_dir = Path(job.run_dir)
    if not (run_dir / frozen.FROZEN_NAME).is_file() or not is_untrained(run_dir):
        return
    with contextlib.suppress(UserError):  # its config does not fit this version
        changes = [f"{key}: {old} before" for key, old, _ in differences(frozen.load(run_dir), job)]
        if changes:
            history.note(run_dir, "taken over", changes=changes)
    if (run_dir / origin.FOLDER).is_dir():
        shutil.rmtree(run_dir / origin.FOLDER)  # a copy of what the other run started from
    own = run_dir / TOKENIZER
    asked = job.data.tokenizer
    if own.is_dir() and not (asked and Path(asked).resolve() == own.resolve()):
        shutil.rmtree(own)  # a copy of the one that the other run read


def require_same_run(job: TrainJob) -> None:
    """Refuse a folder that holds something else; say what goes on with other values.

    A folder in which nothing was trained may become that of another run.

    Raises:
        UserError: if the folder is no run folder, or the run in it has another config.
    """
    run_dir = Path(job.run_dir)
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    untrained = is_untrained(run_dir)
    if not (run_dir / frozen.FROZEN_NAME).is_file():
        if untrained:
            return
        raise UserError(
            f"{run_dir} is not a run folder: it has no {frozen.FROZEN_NAME}, and it is not empty; "
            "choose another run_dir=..."
        )
    try:
        saved = frozen.load(run_dir)
    except ConfigError:
        if not untrained:
            raise
        _log.warning("nothing was trained in %s: this run takes the folder over", run_dir)
        return
    unused = _unused_sections(saved.model, job.model)
    changes = [one for one in differences(saved, job) if not one[0].startswith(unused)]
    foreign = _foreign(saved, job, changes, run_dir)
    if foreign and untrained:
        names = ", ".join(key for key, _, _ in foreign)
        _log.warning(
            "nothing was trained in %s: this run takes the folder over, with other settings (%s)",
            *(run_dir, names),
        )
        return
    if foreign:
        lines = "\n".join(f"  {key}: {old} there, {new} here" for key, old, new in foreign)
        raise UserError(
            f"{run_dir} belongs to a run with another config:\n{lines}\n"
            "Choose another run_dir=..., or start from its weights: "
            f"{typed(setting('checkpoint.load', run_dir))} checkpoint.load_only=weights run_dir=..."
        )
    for key, old, new in changes:
        _log.info("%s: %s before, %s from here on", key, old, new)


def require_same_run_behind(url: str, folder: Path, job: TrainJob) -> None:
    """Refuse a URL with checkpoints of something else.

    Args:
        url: for the message.
        folder: has config and newest position from there.
        job: the run that is to start.

    Raises:
        UserError: with every setting that differs.
    """
    formats.require_readable_folder(folder, formats.RUN_FOLDER)
    saved = frozen.load(folder)
    unused = _unused_sections(saved.model, job.model)
    changes = [one for one in differences(saved, job) if not one[0].startswith(unused)]
    if foreign := _foreign(saved, job, changes, folder):
        lines = "\n".join(f"  {key}: {old} there, {new} here" for key, old, new in foreign)
        raise UserError(
            f"checkpoint.url = {masked(url)} belongs to a run with another config:\n{lines}\n"
            "Choose another checkpoint.url=..."
        )


def _foreign(
    saved: TrainJob, job: TrainJob, changes: Sequence[Change], folder: Path
) -> list[Change]:
    """Return the changes that make it another run than the one in a folder."""
    free = (*_MAY_CHANGE, "data.") if job.data.accept_changes else _MAY_CHANGE
    if any(name in _TEACHERS for name, *_ in changes) and only_moved(saved, job, folder):
        changes = [change for change in changes if change[0] not in _TEACHERS]
    foreign = [
        change
        for change in changes
        if not (change[0].startswith((*free, _PHASES)) or _is_other_cut(*change))
    ]
    return foreign + _moved_phases(saved, job, folder)


def _moved_phases(saved: TrainJob, job: TrainJob, run_dir: Path) -> list[Change]:
    """List phases that have begun and are not as they were; those to come may change."""
    seen = _tokens_seen(run_dir)
    before, now = lay_out(saved), lay_out(job)
    found: list[Change] = []
    for number, old in enumerate(before):
        if old.start >= seen and number:
            break
        new = now[number] if number < len(now) else None
        if new is None or new.start != old.start:
            where = show_tokens(new.start) if new else "gone"
            found.append((f"start of phase {old.name}", show_tokens(old.start), where))
            continue
        is_last = number == len(now) - 1  # which may end at any time
        if old.end != new.end and not is_last and min(old.end, new.end) <= seen:
            ends = (show_tokens(old.end), show_tokens(new.end))
            found.append((f"end of phase {old.name}", *ends))
        if not saved.train.phases or not job.train.phases:
            continue  # what is not in a phase was compared as it stands
        found += [
            (f"train.phases.{number}.{name}", getattr(saved.train.phases[number], name), value)
            for name, value in vars(job.train.phases[number]).items()
            if name in FIXED_SETTINGS and value != getattr(saved.train.phases[number], name)
        ]
    return found


def _tokens_seen(run_dir: Path) -> int:
    """Return the tokens of the newest checkpoint that says how many it has."""
    for found in reversed(layout.complete(run_dir)):
        with contextlib.suppress(UserError):  # it is damaged, and will be set aside
            return int(found.position()["tokens"])
    return 0


def require_same_model(job: TrainJob, found: layout.Found) -> None:
    """Refuse a checkpoint of another model, before anything is built; MTP alone may differ.

    Raises:
        UserError: with every setting that differs.
    """
    saved = frozen.load(found.run_dir).model
    different = list(differences(saved, job.model, "model."))
    unused = _unused_sections(saved, job.model)
    free = _MAY_CHANGE if job.checkpoint.load_only is None else (*_MAY_CHANGE, *_BESIDE_WEIGHTS)
    lines = [
        f"  {key}: {old} there, {new} here"
        for key, old, new in different
        if not (key.startswith((*free, "model.mtp.")) or _is_other_mtp(key, old, new))
        and not key.startswith(unused)
    ]
    if lines:
        text = "\n".join(lines)
        raise UserError(f"checkpoint.load={found.path} is of another model:\n{text}")
    turned = [one for one in different if one[0].startswith(_POSITIONS)]
    if turned:
        text = "; ".join(f"{key}: {old} there, {new} here" for key, old, new in turned)
        _log.warning("positions are turned otherwise than in %s: %s", found.path, text)


def _unused_sections(*models: Model) -> tuple[str, ...]:
    """Name the sections of kinds of layers that one of the models lacks: they say nothing there."""
    layers = [parse(model.pattern).layers for model in models]
    return tuple(key for key, kind in _KINDS.items() if any(kind not in each for each in layers))


def _is_other_cut(key: str, old: object, new: object) -> bool:
    """Tell whether two patterns differ in nothing but where pipeline stages end."""
    return key == _PATTERN and str(old).replace("|", "") == str(new).replace("|", "")


def _is_other_mtp(key: str, old: object, new: object) -> bool:
    """Tell whether two patterns have the same main layers."""
    return key == _PATTERN and parse(str(old)).main == parse(str(new)).main


def require_space(run_dir: Path, num_parameters: int) -> None:
    """Refuse to start where not even one checkpoint would fit.

    Raises:
        UserError: with the room that is needed and the room that is there.
    """
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    needed, free = num_parameters * _BYTES_PER_PARAMETER, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk is full: a checkpoint needs about {needed / 1e6:.0f} MB, and {folder} has "
            f"{free / 1e6:.0f} MB free; free space or choose another run_dir=..."
        )


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield each setting in which two configs differ, with both values.

    A vocabulary that either config leaves to the tokenizer is no difference, nor are credentials,
    which a frozen config does not hold.
    """
    if type(old) is not type(new):
        yield prefix.rstrip("."), type(old).__name__, type(new).__name__
        return
    for field in dataclasses.fields(old):
        key, before, after = (
            f"{prefix}{field.name}",
            getattr(old, field.name),
            getattr(new, field.name),
        )
        if dataclasses.is_dataclass(before):
            yield from differences(before, after, f"{key}.")
        elif _show(before) != _show(after) and not (
            isinstance(old, Model) and field.name == "vocab_size" and None in (before, after)
        ):
            yield key, _show(before), _show(after)


def _show(value: object) -> object:
    return value.value if isinstance(value, enum.Enum) else masked_data(value)
