"""Rules about what a job reads from disk: token files, tokenizers, checkpoints, prompts."""

import os
from collections.abc import Iterator
from pathlib import Path

from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.convert import ConvertJob
from hybrid_train.schema.data import named_sources, needs_tokenizer
from hybrid_train.schema.generate import GenerateJob
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.show import IndexJob
from hybrid_train.schema.source import Split
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.verify import VerifyJob

_SUFFIXES = (".bin", ".idx")
# About as long as the name of a file in a checkpoint that is being written.
_LONGEST_INSIDE = "checkpoints/step_00000000.partial/__000000_000000.distcp.part"


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
        yield from _folder_problems("checkpoint.load", load)


def no_run(path: str, folder: str, config_name: str) -> Problem:
    """Say why a folder is no run folder, nor a checkpoint of one."""
    lacking = list(_folder_problems(path, folder))
    rule = f"is no run folder, nor a checkpoint of one: it has no {config_name}"
    return lacking[0] if lacking else Problem(path, folder, rule)


def _folder_problems(path: str, folder: str) -> Iterator[Problem]:
    """Say that a folder is not there and which one is alike, or why it cannot be looked at."""
    try:
        if Path(folder).is_dir():
            return
    except OSError as error:  # a folder on the way may not be entered, a name is too long
        yield Problem(path, folder, f"cannot be read: {error.strerror}")
        return
    siblings = {str(entry) for entry in _entries(Path(folder).parent, "*") if entry.is_dir()}
    yield Problem(path, folder, "there is no such folder", nearest(folder, siblings))


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


FILE_RULES = (
    run_dir_can_be_a_folder,
    token_files_exist,
    tokenizer_exists,
    checkpoint_to_load_exists,
)


def generation_problems(job: GenerateJob) -> Iterator[Problem]:
    """Yield what a generation job lacks on disk or in its prompts."""
    yield from _folder_problems("checkpoint", job.checkpoint)
    if not job.prompt and job.prompt_file is None:
        yield Problem(
            "prompt", "[]", "needs prompt=TEXT (repeat it for several) or prompt_file=PATH"
        )
    if job.prompt_file is not None and not Path(job.prompt_file).is_file():
        yield Problem("prompt_file", job.prompt_file, "there is no such file")


def folder_problems(job: object) -> Iterator[Problem]:
    """Yield the folders that a conversion or comparison reads and that are not there."""
    named: dict[str, str | None] = {}
    if isinstance(job, ConvertJob):
        named = {"import": job.import_, "export": job.export}
    elif isinstance(job, VerifyJob):
        named = {"checkpoint": job.checkpoint, "hf": job.hf}
    for path, folder in named.items():
        if folder is not None:
            yield from _folder_problems(path, folder)
