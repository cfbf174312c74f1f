"""The stages of a study, planned before any of them starts, and found again by what decides them.

A stage writes into `stages_dir/COMMAND-HASH`; beside that folder lie its log and, once it has ended
well, a file that says so. The hash is of what decides the result: the command, its composed
settings, the hashes of the stages that it reads and the content of the files that it reads. Where
it writes, its threads and who watches it are left out. So equal stages of all studies are one.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.compression.choosing import child_of
from hybrid_train.config import checks, compose, frozen
from hybrid_train.config.commands import COMMANDS, quoted, root_of, setting
from hybrid_train.config.registry import SCHEMAS
from hybrid_train.data import quickstart
from hybrid_train.jobs.study_evaluation import COMMAND, places
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema import formats
from hybrid_train.schema.data import Quickstart
from hybrid_train.schema.limits import FILE
from hybrid_train.schema.names import listed_paths, nearest
from hybrid_train.schema.prepare import DataJob, MergeJob, SplitJob, TokenizeJob
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.pruning import PruneJob
from hybrid_train.schema.study import SEED, StudyJob, references
from hybrid_train.schema.train import TrainJob

_READ_WHOLE = 2**24  # bytes; of a larger file the size and both ends stand for the rest
_END = 2**20
_OF_A_RUN = ("config.yaml", "checkpoints")  # what can be read of a run folder; the rest grows
# A study within a study, and jobs about the folder of a run that is there.
_NO_STAGES = ("study", "submit", "resume", "status", "report")
# Settings that decide nothing of what comes out.
_DECIDES_NOTHING = (
    *("run_dir", "output", "runtime", "tracking", "profile", "data.cache", "data.folder"),
    *("data.remote", "data.warn_epochs"),
    *("checkpoint.interval", "checkpoint.keep", "checkpoint.async_save"),
)
PREFIX = "tokens"  # of token files, within the folder of the stage that writes them
_LETTERS = 16  # of a hash, in the name of a folder


@dataclass(frozen=True)
class PlannedStage:
    """A job that runs before the variants.

    Attributes:
        name: with the seed, if it is made for one.
        command: word of the command line.
        lines: its overrides.
        digest: hash of what decides its result.
        path: of its folder; it has none if it writes none. Its log and its mark lie beside.
        inputs: stages that it reads.
        job: what the lines compose to; None as long as that depends on what an input will write.
        processes: that it takes.
    """

    name: str
    command: str
    lines: Sequence[str]
    digest: str
    path: Path
    inputs: Sequence["PlannedStage"]
    job: checks.Job | None
    processes: int = 1

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def mark(self) -> Path:
        """The file that says that the stage has ended well."""
        return self.path.with_name(f"{self.path.name}.done.json")

    @property
    def resumes(self) -> bool:
        """Whether the command goes on with what it left half done."""
        return self.command in ("train", "data tokenize", "distill_targets")

    def record(self) -> dict[str, Any] | None:
        """Return what was written as the stage ended well; None if it has not, or is gone.

        Raises:
            UserError: if it is of a version that is not read.
        """
        try:
            found = json.loads(self.mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_ours = isinstance(found, dict) and found.get("hash") == self.digest
        if is_ours:
            formats.STAGE.require_readable(found.get(formats.KEY), self.mark)
        return found if is_ours and (self.path.is_dir() or not found["folder"]) else None

    def is_finished(self) -> bool:
        return self.record() is not None

    def finish(self, seconds: float) -> None:
        """Write that the stage has ended well; a reader sees all of it or nothing."""
        record = {
            formats.KEY: formats.STAGE.stamp(),
            "hash": self.digest,
            "command": self.command,
            "overrides": list(self.lines),
            "folder": self.path.is_dir(),
            "seconds": round(seconds, 1),
        }
        half = self.mark.with_suffix(".tmp")
        half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        half.replace(self.mark)

    def ancestors(self) -> Iterator["PlannedStage"]:
        """Yield the stages that this one comes from, in the order in which they run."""
        for one in self.inputs:
            yield from one.ancestors()
            yield one


class Stages:
    """Plans the stages that are asked for, each once.

    What a stage will write is not there yet when those behind it are checked. In its place stands a
    folder in `scratch`: of a training run it holds the config, from which others take the model; of
    a cut that of its child, unless scores that are not there yet say which layers stay.

    Attributes:
        planned: by hash, in the order in which they can run.
        problems: of those that cannot run, by name.
    """

    def __init__(self, study: StudyJob, scratch: Path) -> None:
        self.planned: dict[str, PlannedStage] = {}
        self.problems: dict[str, list[Problem]] = {}
        self._study, self._scratch = study, scratch
        self._known: dict[tuple[str, int | None], PlannedStage | None] = {}

    def of(self, name: str, seed: int) -> PlannedStage | None:
        """Return a stage as it is made for a seed; None if it cannot run."""
        key = (name, seed if self._is_of_a_seed(name) else None)
        if key not in self._known:
            self._known[key] = None
            try:
                self._known[key] = self._plan(*key)
            except ConfigError as error:
                known = self.problems.setdefault(name, [])
                known += [problem for problem in error.problems if problem not in known]
        return self._known[key]

    def inputs(self, lines: Sequence[str], seed: int) -> dict[str, PlannedStage] | None:
        """Return the stages that lines refer to, by name; None if one of them cannot run.

        Raises:
            ConfigError: if one of them writes nothing that could be referred to.
        """
        names = [name for name in references(lines) if name != SEED]
        found = {name: stage for name in names if (stage := self.of(name, seed)) is not None}
        for name, stage in found.items():
            if _output_key(stage.command) is None:
                rule = f"{stage.command} writes no folder, so that nothing can refer to it"
                raise ConfigError([Problem(f"stages.{name}.command", stage.command, rule)])
        return found if len(found) == len(names) else None

    def filled(self, lines: Sequence[str], seed: int | None, *, ahead: bool) -> list[str]:
        """Put folders and the seed in place of `{NAME}` and `{seed}`.

        Args:
            lines: overrides.
            seed: of the study.
            ahead: take the folders that stand for those that are not there yet.
        """
        inputs = self.inputs(lines, seed or 0) or {}
        places = {
            name: str(self._scratch / one.digest if ahead else one.path)
            for name, one in inputs.items()
        }
        return [_filled(line, {**places, SEED: str(seed)}) for line in lines]

    def checked(self, root: str, lines: Sequence[str], processes: int = 1) -> checks.Job | None:
        """Compose a job; None if what is wrong with it is only that an input is not there yet.

        Args:
            root: of the job.
            lines: its overrides.
            processes: that it will run on.

        Raises:
            ConfigError: with all other problems.
        """
        try:
            return compose.compose(root, lines, processes=processes)
        except ConfigError as error:
            found = [one for one in error.problems if str(self._scratch) not in repr(one)]
            if found:
                raise ConfigError(found) from error
            return None

    def check_evaluation(self, lines: Sequence[str], seed: int) -> None:
        """Check what runs will be asked, which are not there yet.

        Raises:
            ConfigError: with all problems, by the setting of the study.
        """
        ahead = self.filled(lines, seed, ahead=True)
        try:
            self.checked(
                COMMAND, [*ahead, *places(self._scratch / "run", self._scratch / "output")]
            )
        except ConfigError as error:
            raise ConfigError(
                [dataclasses.replace(one, path=f"evaluate: {one.path}") for one in error.problems]
            ) from error

    def as_it_will_be(self, text: object) -> object:
        """Return a value with the folders of stages in place of those that stand for them."""
        if not isinstance(text, str) or str(self._scratch) not in text:
            return text
        for digest, stage in self.planned.items():
            text = text.replace(str(self._scratch / digest), str(stage.path))
        return text

    def plan_results(self) -> None:
        """Plan the stages that nothing refers to: what they say is a result of its own."""
        study = self._study
        lines = [*study.base, *study.overrides]
        lines += [line for one in study.stages.values() for line in one.overrides]
        lines += [line for one in study.variants.values() for line in one.overrides]
        for name in study.stages:
            if name not in references(lines):
                for seed in study.seeds:
                    self.of(name, seed)

    def _is_of_a_seed(self, name: str) -> bool:
        names = references(self._lines(name))
        return SEED in names or any(self._is_of_a_seed(one) for one in names if one != SEED)

    def _lines(self, name: str) -> list[str]:
        stage = self._study.stages[name]
        # Whatever takes the settings of a training: targets are those of the rows of a run.
        schema = SCHEMAS.get(("job", root_of(stage.command)), object)
        is_training = issubclass(schema, TrainJob)
        return [*stage.overrides, *(self._study.overrides if is_training else ())]

    def _plan(self, name: str, seed: int | None) -> PlannedStage | None:
        command = self._study.stages[name].command
        _require_stage(command)
        shown = name if seed is None else f"{name} seed {seed}"
        processes = self._study.stages[name].processes
        return self.plan(shown, command, self._lines(name), seed, processes)

    def plan(
        self,
        shown: str,
        command: str,
        lines: Sequence[str],
        seed: int | None,
        processes: int = 1,
    ) -> PlannedStage | None:
        """Plan a job that writes a folder; None if a stage that it reads cannot run.

        Args:
            shown: its name.
            command: word of the command line.
            lines: its overrides.
            seed: that `{seed}` stands for.
            processes: that it takes.

        Raises:
            ConfigError: if it cannot run itself.
        """
        inputs = self.inputs(lines, seed or 0)
        if inputs is None:
            return None  # the reason is reported where it is
        root, ahead = root_of(command), self.filled(lines, seed, ahead=True)
        there = _place(command, self._scratch / "output")
        job = self.checked(root, [*ahead, *there], processes)
        digest = self._digest(root, job or compose.draft(root, ahead).config)
        if digest in self.planned:
            return self.planned[digest]
        path = Path(self._study.stages_dir) / f"{command.replace(' ', '_')}-{digest[:_LETTERS]}"
        self._stand_in(digest, job)
        real = [*self.filled(lines, seed, ahead=False), *_place(command, path)]
        values = tuple(inputs.values())
        stage = PlannedStage(shown, command, real, digest, path, values, job, processes)
        self.planned[digest] = stage
        return stage

    def _stand_in(self, digest: str, job: checks.Job | None) -> None:
        folder = self._scratch / digest
        folder.mkdir(exist_ok=True)
        run = _child_of(job) if isinstance(job, PruneJob) else job
        if isinstance(run, TrainJob):
            frozen.freeze(run, folder)

    def _digest(self, root: str, config: checks.Job | DictConfig) -> str:
        """Hash the config of a job; it names the stages that it reads by their hashes."""
        if isinstance(config, DictConfig):  # of a job that cannot be known whole yet
            plain, sections = OmegaConf.to_container(config, enum_to_str=True), _known(config)
        else:
            plain, sections = frozen.to_dict(config), dict(vars(config))
        assert isinstance(plain, dict), "the root of a job has names"
        files = file_versions(SCHEMAS["job", root], sections, _DECIDES_NOTHING)
        facts = {
            "command": root,
            "config": _deciding(plain),
            "files": {key: one for key, one in files.items() if str(self._scratch) not in key},
        }
        text = json.dumps(facts, sort_keys=True, default=str).replace(str(self._scratch), "stage")
        return hashlib.sha256(text.encode()).hexdigest()


def _child_of(job: PruneJob) -> TrainJob | None:
    """Return a run with the model that a cut will write; None if that cannot be known yet.

    Raises:
        ConfigError: if no child of this parent can be as it is asked.
    """
    for parent in compose.runs_of(job.checkpoint):
        model = parent.model
        counts = job.share is not None or job.budget is not None
        if counts and model.vocab_size is None:
            return None
        model.pattern = model.pattern.replace("|", "")  # cuts are of the layout, not of the model
        child = child_of(model, job, padded_vocab_size(model.vocab_size or 0, model.vocab_multiple))
        return None if child is None else dataclasses.replace(parent, model=child)
    return None


def _known(config: DictConfig) -> dict[str, Any]:
    """Return the sections of a config that are set."""
    sections = {}
    for name in map(str, config):
        try:
            value = config[name]
            sections[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            continue  # it is not set, so that it names no file
    return sections


def _require_stage(command: str) -> None:
    """Refuse what is no job of its own.

    Raises:
        ConfigError: naming the nearest that is.
    """
    known = [name for name, one in COMMANDS.items() if one.schema and name not in _NO_STAGES]
    if command not in known:
        rule = f"must be one of {', '.join(known)}"
        raise ConfigError([Problem("command", command, rule, nearest(command, known))])


def _output_key(command: str) -> str | None:
    """Return the setting that says where a command writes; None if it writes no folder."""
    names = {field.name for field in dataclasses.fields(SCHEMAS["job", root_of(command)])}
    return "output" if "output" in names else "run_dir" if command == "train" else None


def _place(command: str, path: Path) -> list[str]:
    """Return the override that says where a stage writes."""
    key = _output_key(command)
    if key is None:
        return []
    writes_files = issubclass(SCHEMAS["job", root_of(command)], TokenizeJob | MergeJob | SplitJob)
    return [setting(key, path / PREFIX if writes_files else path)]


def _filled(line: str, places: Mapping[str, str]) -> str:
    """Replace references; a path around one is quoted as a whole, where Hydra asks for it."""
    around = re.compile(r"[\w./@:-]*(?:\{[\w.-]+\}[\w./@:-]*)+")

    def named(match: re.Match[str]) -> str:
        return re.sub(r"\{([\w.-]+)\}", lambda one: places.get(one[1], one[0]), match[0])

    return around.sub(lambda match: quoted(named(match)), line)


def _deciding(plain: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """Return the settings that decide what comes out."""
    kept = {}
    for key, value in plain.items():
        path = f"{above}{key}"
        if path not in _DECIDES_NOTHING:
            kept[path] = _deciding(value, f"{path}.") if isinstance(value, dict) else value
    return kept


def file_versions(
    schema: type[Any], sections: dict[str, Any], left_out: Sequence[str] = ()
) -> dict[str, object]:
    """Describe every file and folder that a job names and that exists, by the setting and its name.

    Args:
        schema: dataclass of the job.
        sections: its values by name; sections as dataclasses.
        left_out: settings that are not looked at.
    """
    hints = get_type_hints(schema, include_extras=True)
    found: dict[str, object] = {}
    for name, value in sections.items():
        if isinstance(value, Quickstart):
            found[name] = quickstart.versions(value)
            continue
        named = list(file_names(hints[name], value, name))
        if name == "input" and issubclass(schema, DataJob):
            named += [(name, path) for path in listed_paths(value)]
        found |= {
            f"{path} {file}": _version(file)
            for path, file in named
            if not path.startswith(tuple(left_out))
        }
    return {path: version for path, version in found.items() if version is not None}


def file_names(kind: Any, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield setting and value of all that a type says is the name of a file or a folder."""
    inner = get_args(kind)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        for field in dataclasses.fields(value):
            yield from file_names(
                hints[field.name], getattr(value, field.name), f"{path}.{field.name}"
            )
    elif get_origin(kind) is Annotated:
        if FILE in kind.__metadata__ and isinstance(value, str):
            yield path, value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from file_names(inner[-1], part, path)
    elif value is not None:
        for part_kind in inner:
            yield from file_names(part_kind, value, path)


def _version(name: str) -> object | None:
    """Describe a file, a pair of token files, or a folder; None where there is no such thing."""
    path = Path(name)
    index = Path(f"{name}.idx")
    try:
        if index.is_file():
            return [_file_digest(index), Path(f"{name}.bin").stat().st_size]
        if path.is_file():
            return _file_digest(path)
        if path.is_dir():
            return _folder_digests(path)
    except OSError:
        return None  # whoever opens it says what is wrong
    return None


def _folder_digests(folder: Path) -> dict[str, str]:
    is_run = (folder / _OF_A_RUN[0]).is_file() and (folder / _OF_A_RUN[1]).is_dir()
    places = [folder / name for name in _OF_A_RUN] if is_run else [folder]
    files = [place for place in places if place.is_file()]
    files += [file for place in places for file in place.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): _file_digest(file) for file in sorted(files)}


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _READ_WHOLE:
            digest.update(file.read())
        else:
            digest.update(file.read(_END))
            file.seek(size - _END)
            digest.update(file.read())
    return digest.hexdigest()
