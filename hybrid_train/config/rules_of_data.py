"""Rules about what a job reads: batches, sources and phases, packed rows, files on disk.

Where a comment names a file, it is one of Megatron-Core 0.19.2.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hybrid_train.planning import degrees
from hybrid_train.planning.phases import PHASE_SETTINGS, scheduled_tokens
from hybrid_train.schema.checkpoint import URL, URL_RULE
from hybrid_train.schema.data import (
    Data,
    Packing,
    Split,
    has_sources,
    named_sources,
    needs_tokenizer,
)
from hybrid_train.schema.importance import ImportanceJob
from hybrid_train.schema.job_roots import (
    CheckJob,
    ConvertJob,
    EvaluateJob,
    GenerateJob,
    IndexJob,
    VerifyJob,
)
from hybrid_train.schema.names import listed_paths, nearest
from hybrid_train.schema.optimizer import Wsd
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Device, Kernels
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import is_position, is_tokens, position, show_tokens, tokens

_EXCEPTION_OF_RUN = re.compile(r"precision\.exceptions\.(\d+)(.*)")
_SUFFIXES = (".bin", ".idx")
# About as long as the name of a file in a checkpoint that is being written.
_LONGEST_INSIDE = "checkpoints/step_00000000.partial/__000000_000000.distcp.part"


def _sequence_is_split_evenly(job: TrainJob, _: int) -> Iterator[Problem]:
    plan, length = job.parallel, job.train.sequence_length
    # Each context rank takes one early and one late chunk, so that causal work is equal.
    chunks = 2 * plan.context if plan.context > 1 else 1
    if degrees.splits_sequence(plan):
        chunks = math.lcm(chunks, plan.context * plan.tensor)
    if length % chunks:
        rule = f"must be a multiple of {chunks} to split along the sequence"
        legal = degrees.nearest_multiple(length, chunks)
        yield Problem("train.sequence_length", length, rule, legal, unit=chunks)


def _mtp_has_tokens_to_predict(job: TrainJob, _: int) -> Iterator[Problem]:
    depths, length = parse(job.model.pattern).mtp_depths, job.train.sequence_length
    if depths and length <= depths:
        rule = f"must be longer than the {depths} MTP depths of the pattern"
        yield Problem("train.sequence_length", length, rule)


def _batch_is_whole_microbatches(job: TrainJob, world_size: int) -> Iterator[Problem]:
    train = job.train
    unit, ranks = _shares_of_a_batch(job, world_size)
    per_rank, rest = divmod(train.global_batch, unit)
    if rest or not per_rank:
        rule = f"must be a multiple of {train.microbatch} (train.microbatch) x {ranks}"
        whole = unit * train.microbatch
        legal = degrees.nearest_multiple(train.global_batch, whole)
        beside = ("train.microbatch",)
        yield Problem("train.global_batch", train.global_batch, rule, legal, whole, beside)
    elif per_rank % train.microbatch:
        rule = f"must divide {per_rank}, the share of train.global_batch of {ranks}"
        yield Problem("train.microbatch", train.microbatch, rule, beside=("train.global_batch",))


def _shares_of_a_batch(job: TrainJob, world_size: int) -> tuple[int, str]:
    """Return how many shares a batch has, each of whole microbatches, and why in words."""
    plan = job.parallel
    # A wrong number of processes is reported as such; here the nearest legal one counts.
    processes = degrees.nearest_multiple(world_size, degrees.processes_unit(plan))
    shares = degrees.data_parallel(plan, processes)
    ranks = f"{shares} data-parallel ranks"
    if plan.virtual_pipeline == 1:
        return shares, ranks
    # pipeline_parallel/schedules.py 1145, interleaved groups
    return shares * plan.pipeline, f"{ranks} x {plan.pipeline} pipeline stages"


def _batch_ramp_reaches_the_batch(job: TrainJob, world_size: int) -> Iterator[Problem]:
    train, ramp = job.train, job.train.batch_ramp
    if not all(map(is_tokens, (train.tokens, ramp.tokens))) or not tokens(ramp.tokens):
        return
    if tokens(ramp.tokens) > tokens(train.tokens):
        rule = f"must not exceed train.tokens ({train.tokens})"
        yield Problem("train.batch_ramp.tokens", ramp.tokens, rule, train.tokens)
    shares, ranks = _shares_of_a_batch(job, world_size)
    unit = shares * train.microbatch
    if train.global_batch <= unit:
        rule = f"leaves no batch below train.global_batch ({train.global_batch}); needs more than "
        rule += f"{train.microbatch} (train.microbatch) x {ranks}"
        yield Problem("train.batch_ramp.tokens", ramp.tokens, rule, "0")
        return
    uneven = [name for name in ("start_batch", "increment") if getattr(ramp, name) % unit]
    for name in uneven:
        size = getattr(ramp, name)
        rule = f"must be a multiple of {train.microbatch} (train.microbatch) x {ranks}"
        legal = degrees.nearest_multiple(size, unit)
        yield Problem(f"train.batch_ramp.{name}", size, rule, legal, unit=unit)
    room = train.global_batch - ramp.start_batch
    if uneven:
        return
    if room <= 0:
        rule = f"must be less than train.global_batch ({train.global_batch})"
        legal = (train.global_batch - 1) // unit * unit
        yield Problem("train.batch_ramp.start_batch", ramp.start_batch, rule, legal)
    elif room % ramp.increment:
        rule = f"must divide the {room} sequences from start_batch to train.global_batch"
        fits = [step for step in range(1, room + 1) if not room % step and not step % unit]
        near = min(fits or [room], key=lambda step: abs(step - ramp.increment))
        yield Problem("train.batch_ramp.increment", ramp.increment, rule, near)


def _schedule_fits_the_run(job: TrainJob, _: int) -> Iterator[Problem]:
    decay = job.schedule.decay_tokens if isinstance(job.schedule, Wsd) else "0"
    if not all(map(is_tokens, (job.train.tokens, job.schedule.warmup_tokens, decay))):
        return  # reported where they stand
    if not all(is_position(phase.start) for phase in job.train.phases):
        return
    room = scheduled_tokens(job.train)
    whole = f"train.tokens ({job.train.tokens})"
    if room != tokens(job.train.tokens):
        whole = f"the {show_tokens(room)} tokens of phases without constant_lr"
    warmup = job.schedule.warmup_tokens
    if tokens(warmup) > room:
        rule = f"must not exceed {whole}"
        yield Problem("schedule.warmup_tokens", warmup, rule, str(max(0, room - tokens(decay))))
        room = tokens(decay) if tokens(decay) <= room else room
    else:
        room -= tokens(warmup)
    if tokens(decay) > room:
        rule = f"and warm-up ({warmup}) must fit into {whole}"
        yield Problem("schedule.decay_tokens", decay, rule, str(room))


# The rules that depend on the number of processes, beside that the degrees divide it.
SHARE_RULES = (_batch_is_whole_microbatches, _batch_ramp_reaches_the_batch)
BATCH_RULES = (
    _sequence_is_split_evenly,
    _mtp_has_tokens_to_predict,
    *SHARE_RULES,
    _schedule_fits_the_run,
)


def sources_are_named_once(data: Data) -> Iterator[Problem]:
    """Files stand in one of two places, and a blend speaks of sources that there are."""
    if data.sources and (data.train or data.validation):
        name = "train" if data.train else "validation"
        rule = "must be empty with data.sources: name these files in a source"
        yield Problem(f"data.{name}", getattr(data, name), rule, "[]")
    for blend, split in (("blend", Split.train), ("validation_blend", Split.validation)):
        for name, weight in getattr(data, blend).items():
            yield from _entry_problems(f"data.{blend}", name, weight, data, split)
    for name, source in data.sources.items():
        if source.longest is not None and data.packing is Packing.none:
            path = f"data.sources.{name}.longest"
            yield Problem(path, source.longest, "needs data.packing=best_fit", "null")


def _entry_problems(
    path: str, name: str, weight: float, data: Data, split: Split
) -> Iterator[Problem]:
    """Yield what is wrong with one entry of a blend."""
    if not has_sources(data) or name not in data.sources:
        known = ", ".join(data.sources) or "none"
        rule = f"is no source of data.sources ({known})"
        yield Problem(f"{path}.{name}", weight, rule, nearest(name, data.sources))
    elif weight > 0 and not data.sources[name].has(split):
        yield Problem(f"{path}.{name}", weight, f"has no {split.value} data", 0)


def phases_are_in_order(job: TrainJob, _: int) -> Iterator[Problem]:
    """Phases have names of their own, begin at the start of the run, and follow each other."""
    phases, total = job.train.phases, job.train.tokens
    if not phases or not is_tokens(total) or not all(is_position(one.start) for one in phases):
        return  # reported where they stand
    for number, phase in enumerate(phases):
        path = f"train.phases.{number}"
        # Without sources these blends are left out (`phases.unread_sources`), and that is said.
        for name, weight in phase.blend.items() if has_sources(job.data) else ():
            yield from _entry_problems(f"{path}.blend", name, weight, job.data, Split.train)
        if phase.name in {one.name for one in phases[:number]}:
            yield Problem(f"{path}.name", phase.name, "is the name of an earlier phase")
        start = position(phase.start, tokens(total))
        if number == 0 and start:
            yield Problem(f"{path}.start", phase.start, "must be 0: the run begins with it", "0")
        elif number and start <= position(phases[number - 1].start, tokens(total)):
            rule = f"must lie after the start of the phase before ({phases[number - 1].start})"
            yield Problem(f"{path}.start", phase.start, rule)
        elif start >= tokens(total):
            rule = (
                f"must lie before train.tokens ({total}); 'train.phases=[]' trains without phases"
            )
            yield Problem(f"{path}.start", phase.start, rule)
    ramp = job.train.batch_ramp.tokens
    if len(phases) > 1 and is_tokens(ramp):
        second = position(phases[1].start, tokens(total))
        if tokens(ramp) > second:
            rule = f"must not exceed the start of the second phase ({phases[1].start})"
            legal = phases[1].start if is_tokens(phases[1].start) else str(second)
            yield Problem("train.batch_ramp.tokens", ramp, rule, legal)


def as_problem_of(number: int, job: TrainJob, problem: Problem) -> Problem | None:
    """Return a problem of the run as it is in a phase, with the path of what caused it.

    That is the setting of the latest phase up to this one which sets it, or that of the run. None
    for an exception of the run, which stands behind those of the phase: they may well leave it
    nothing to decide, and what is wrong with it otherwise is found in the run itself. None, too,
    for FP8 primary weights, of which a phase may have none any more.
    """
    if problem.path == "precision.fp8_param_gather":
        return None
    if rule := _EXCEPTION_OF_RUN.fullmatch(problem.path):
        for earlier in range(number, -1, -1):
            own = job.train.phases[earlier].precision_exceptions
            if own is not None:
                path = f"train.phases.{earlier}.precision_exceptions.{rule[1]}{rule[2]}"
                return replace(problem, path=path) if int(rule[1]) < len(own) else None
        return None
    beside = tuple(_place_in_phases(number, job, path) for path in problem.beside)
    place = _place_in_phases(number, job, problem.path)
    if place != problem.path:
        return replace(problem, path=place, beside=beside)
    phase = job.train.phases[number].name
    return replace(problem, rule=f"{problem.rule} [phase {phase}]", beside=beside)


def _place_in_phases(number: int, job: TrainJob, path: str) -> str:
    """Return where a setting of the run is set for a phase: there, or in the run."""
    for name, of_run in PHASE_SETTINGS.items():
        if path == of_run:
            for earlier in range(number, -1, -1):
                if getattr(job.train.phases[earlier], name):
                    return f"train.phases.{earlier}.{name}"
    return path


def packed_rows_run(job: TrainJob, _: int) -> Iterator[Problem]:
    """Refuse a layout that mixes up documents.

    With `runtime.kernels=auto` on whatever device there is, the model refuses at its first step
    (`megatron/mamba.py`).
    """
    if job.data.packing is Packing.none:
        return
    kernels, device = job.runtime.kernels, job.runtime.device
    fused = kernels is Kernels.fused or (kernels is Kernels.auto and device is Device.cuda)
    if fused and job.parallel.context > 1:
        # Its attention takes 2 * context chunks of each document, all of equal length
        # (extensions/transformer_engine.py 2012, qkv_format thd); our ranks hold chunks of rows.
        rule = (
            "must be plain: Transformer Engine cannot keep documents of a row apart with "
            f"parallel.context={job.parallel.context}"
        )
        yield Problem("runtime.kernels", kernels.value, rule, "plain")


def data_is_chosen(job: TrainJob) -> Iterator[Problem]:
    """Token files of one's own are named, and so is the tokenizer that made them."""
    data = job.data
    if data.kind != "files":
        return
    sources = named_sources(data).values()
    if not any(source.has(Split.train) for source in sources):
        rule = "needs at least one prefix of a .bin and .idx file; or choose data=quickstart"
        yield Problem("data.train", "[]", rule)
    if data.tokenizer is None and needs_tokenizer(data):
        own = Path(job.checkpoint.load or "") / "tokenizer"  # of the run whose weights are taken
        near = str(own) if job.checkpoint.load and own.is_dir() else None
        rule = "must name the folder of the tokenizer of data.train"
        yield Problem("data.tokenizer", None, rule, near)


def vocabulary_is_known(job: TrainJob) -> Iterator[Problem]:
    """A plan needs the size of the vocabulary, or a tokenizer to take it from."""
    if job.data.kind != "files" or job.model.vocab_size is not None:
        return
    if job.data.tokenizer is None and needs_tokenizer(job.data):
        rule = "must be set: the model takes that of data.tokenizer, which is not set either"
        yield Problem("model.vocab_size", "null", rule, 131072)


def run_dir_can_be_a_folder(job: TrainJob) -> Iterator[Problem]:
    """The run folder is made where nothing stands in its way, and this user may write."""
    # A plan may be for another machine.
    here = not isinstance(job, CheckJob | IndexJob)
    obstacle = what_forbids(Path(job.run_dir), writing=here)
    if obstacle is not None:
        yield Problem("run_dir", job.run_dir, obstacle)


def what_forbids(folder: Path, *, writing: bool = True) -> str | None:
    """Say why a folder cannot be there, or not be written into; None if it can."""
    try:
        os.lstat(folder / _LONGEST_INSIDE)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the way there says more
    except (OSError, ValueError) as error:
        return f"can be no path: {getattr(error, 'strerror', None) or error}"
    for place in (folder, *folder.parents):
        try:
            is_folder = place.is_dir()
        except OSError as error:
            return f"{place} cannot be reached: {error.strerror}"
        if is_folder:
            return _why_not_written(place) if writing else None
        if os.path.lexists(place):
            what = "a link that leads nowhere" if place.is_symlink() else "a file, not a folder"
            return f"{place} is {what}"
    return None


def _why_not_written(folder: Path) -> str | None:
    if os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return None
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} is on a file system that is read-only"
    return f"this user may not read and write in {folder}"


def token_files_exist(job: TrainJob) -> Iterator[Problem]:
    """Token files are named by prefix and come in pairs."""
    if job.data.kind != "files":
        return
    for source, part in named_sources(job.data).items():
        where = f"data.sources.{source}" if job.data.sources else "data"
        for split in Split:
            for prefix in part.prefixes(split):
                yield from _prefix_problems(f"{where}.{split.value}", prefix)


def _prefix_problems(path: str, prefix: str) -> Iterator[Problem]:
    """Yield what is wrong with one prefix."""
    if prefix.endswith(_SUFFIXES):
        yield Problem(path, prefix, "must be named without .bin or .idx", prefix[:-4])
        return
    if "://" in prefix:
        return  # found out when it is opened, not before every command
    lacking = [prefix + suffix for suffix in _SUFFIXES if not _may_be_file(prefix + suffix)]
    if lacking:
        siblings = {str(file)[:-4] for file in _entries(Path(prefix).parent, "*.idx")}
        rule = f"there is no file {' and no '.join(lacking)}"
        yield Problem(path, prefix, rule, nearest(prefix, siblings))


def _may_be_file(path: str | Path) -> bool:
    """Tell whether there may be a file; whoever opens it says that it may not be read."""
    try:
        return Path(path).is_file()
    except PermissionError:
        return True


def _entries(folder: Path, glob: str) -> list[Path]:
    """List a folder; one that cannot be read has no entries."""
    try:
        return sorted(folder.glob(glob))
    except OSError:
        return []


def tokenizer_exists(job: TrainJob) -> Iterator[Problem]:
    """The tokenizer is there: tokenizer.json of a folder, or a SentencePiece model."""
    folder = job.data.tokenizer
    if job.data.kind != "files" or folder is None:
        return
    places = [Path(folder) / name for name in ("tokenizer.json", "tokenizer.model")]
    if folder.endswith(".model"):
        places.append(Path(folder))
    if not any(map(_may_be_file, places)):
        rule = "must be a folder with a tokenizer.json or tokenizer.model in it, or a .model file"
        yield Problem("data.tokenizer", folder, rule)


def checkpoint_to_load_exists(job: TrainJob) -> Iterator[Problem]:
    """A start from a checkpoint needs that checkpoint."""
    load = job.checkpoint.load
    if load is None and job.checkpoint.load_only is not None:
        value = job.checkpoint.load_only.name
        yield Problem("checkpoint.load_only", value, "needs checkpoint.load=PATH", "null")
    if load is not None:
        yield from checkpoint_problems("checkpoint.load", load)


def no_run(path: str, folder: str, config_name: str) -> Problem:
    """Say why a folder is no run folder, nor a checkpoint of one."""
    lacking = list(folder_problems(path, folder))
    rule = f"is no run folder, nor a checkpoint of one: it has no {config_name}"
    return lacking[0] if lacking else Problem(path, folder, rule)


def checkpoint_problems(path: str, place: str) -> Iterator[Problem]:
    """Say that a folder is not there, or that a URL is none; what it names is known when asked."""
    if "://" not in place:
        yield from folder_problems(path, place)
    elif not URL.fullmatch(place):
        yield Problem(path, place, URL_RULE)


def folder_problems(path: str, folder: str) -> Iterator[Problem]:
    """Say that a folder is not there and which one is alike, or why it cannot be looked at."""
    if "://" in folder:
        yield Problem(path, folder, "must be a folder; copy what lies behind a URL to one first")
        return
    try:
        if Path(folder).is_dir():
            return
    except OSError as error:  # a folder on the way may not be entered, a name is too long
        yield Problem(path, folder, f"cannot be read: {error.strerror}")
        return
    siblings = {str(entry) for entry in _entries(Path(folder).parent, "*") if entry.is_dir()}
    yield Problem(path, folder, "there is no such folder", nearest(folder, siblings))


FILE_RULES = (
    run_dir_can_be_a_folder,
    token_files_exist,
    tokenizer_exists,
    checkpoint_to_load_exists,
)


def generation_problems(job: GenerateJob) -> Iterator[Problem]:
    """Yield what a generation job lacks on disk or in its prompts."""
    yield from checkpoint_problems("checkpoint", job.checkpoint)
    if not job.prompt and not job.messages and job.prompt_file is None:
        yield Problem(
            "prompt",
            "[]",
            "needs prompt=TEXT (repeat it for several), messages=JSON or prompt_file=PATH",
        )
    if job.prompt_file is not None and not Path(job.prompt_file).is_file():
        yield Problem("prompt_file", job.prompt_file, "there is no such file")
    if job.output is not None and not Path(job.output).absolute().parent.is_dir():
        yield Problem("output", job.output, "is in a folder that is not there; make it first")
    if job.output is not None and Path(job.output).is_dir():
        yield Problem("output", job.output, "is a folder; it must be a file", f"{job.output}.jsonl")


def conversion_problems(job: object) -> Iterator[Problem]:
    """Yield the folders that a conversion or comparison reads and that are not there."""
    if isinstance(job, ConvertJob):
        if job.import_ is not None:
            yield from folder_problems("import", job.import_)
        if job.export is not None:
            yield from checkpoint_problems("export", job.export)
    elif isinstance(job, VerifyJob):
        yield from checkpoint_problems("checkpoint", job.checkpoint)
        yield from folder_problems("hf", job.hf)


def importance_problems(job: ImportanceJob) -> Iterator[Problem]:
    """Yield what keeps a ranking from being made, on disk."""
    yield from checkpoint_problems("checkpoint", job.checkpoint)
    output = Path(job.output)
    if output.is_file():
        yield Problem("output", job.output, "is a file; it must be a folder")
    elif output.is_dir() and any(output.iterdir()):
        yield Problem("output", job.output, "is not empty; a ranking gets a folder of its own")


def evaluation_problems(job: EvaluateJob) -> Iterator[Problem]:
    """Yield what an evaluation lacks on disk."""
    for name in listed_paths(job.checkpoint):
        yield from checkpoint_problems("checkpoint", name)
    if job.against is not None:
        yield from checkpoint_problems("against", job.against)
    if job.output is not None and Path(job.output).is_file():
        yield Problem("output", job.output, "is a file; it must be a folder")
