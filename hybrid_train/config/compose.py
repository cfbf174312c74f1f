"""From names and overrides to a typed, checked job; and a run's own config back from its folder.

Nothing is written and no process group is needed: every process composes for itself.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from hybrid_train.config import checks, launcher, node_counts, overrides, registry
from hybrid_train.config.names import nearest
from hybrid_train.config.problems import ConfigError, Problem, UserError, collect
from hybrid_train.config.schema.check import CheckJob
from hybrid_train.config.schema.count import CountJob
from hybrid_train.config.schema.generate import GenerateJob
from hybrid_train.config.schema.submit import SubmitJob
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.config.secrets import masked, masked_data

FROZEN_NAME = "config.yaml"  # of the config in a run folder
# Keys that take text as it stands: commas and * mean nothing to Hydra there.
RAW_KEYS = {
    "generate": ("prompt",),
    "study": ("overrides",),
    "data_train_tokenizer": ("input", "special_tokens"),
    **dict.fromkeys(
        ("data_tokenize", "data_merge", "data_split", "data_inspect", "data_count", "data_verify"),
        ("input",),
    ),
}
# Choices that have a better word on the command line than the folder in conf/ that they are of.
GROUP_WORDS = {"study": {"name": "study"}}
_WHAT_IS_READY = {
    "train": "`hybrid-train recipes` lists experiments with everything set",
    "check": "`hybrid-train recipes` lists experiments with everything set",
    "submit": "`hybrid-train recipes` lists experiments with everything set",
    "count": "`hybrid-train models` lists the models that have a name: model=NAME",
    "study": "name=NAME takes one that is ready: `hybrid-train study --help` lists them",
}
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


@dataclass
class Draft:
    """A composed config and what was wrong on the way to it."""

    config: DictConfig
    problems: list[Problem]
    wrong_groups: set[str]  # groups whose choice does not exist


def conf_dir() -> Path:
    """Return the folder of YAML files.

    Raises:
        UserError: if it is in none of the places where it may lie.
    """
    own = os.environ.get("HYBRID_TRAIN_CONF")
    source_tree = Path(__file__).resolve().parents[2] / "conf"
    wheel = Path(sys.prefix) / "share" / "hybrid_train" / "conf"
    places = [Path(own).resolve()] if own else [source_tree, wheel]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(
        f"no folder with the configuration (train.yaml in it) at {looked}; install the package "
        "again, or set HYBRID_TRAIN_CONF to the conf folder"
    )


@contextmanager
def config_loader(job_name: str) -> Iterator[ConfigLoader]:
    """Open Hydra on the conf folder for as long as the block lasts."""
    registry.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), job_name=job_name, version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def group_names(job_name: str) -> list[str]:
    """Return the config groups of a job, in the order of its defaults list."""
    found: list[str] = []
    root = cast("DictConfig", OmegaConf.load(conf_dir() / f"{job_name}.yaml"))
    for entry in root.defaults:
        if isinstance(entry, DictConfig):
            found += [str(group) for group in entry if "/schema/" not in str(group)]
        elif (conf_dir() / f"{entry}.yaml").is_file():  # another job, which this one is based on
            found += group_names(str(entry))
    return found


def draft(job_name: str, lines: Sequence[str]) -> Draft:
    """Compose without checks; settings that do not fit are left out and reported."""
    with config_loader(job_name) as loader:
        groups = group_names(job_name)
        words = GROUP_WORDS.get(job_name, {})
        given = overrides.read(spelt_out(job_name, lines), groups, RAW_KEYS.get(job_name, ()))
        problems, wrong, choices = given.problems, set(), []
        # With folders of the user's own, Hydra itself says which choices there are.
        own_folders = any(one.key_or_group == "hydra.searchpath" for one in given.groups)
        for override in given.groups:
            problem = None if own_folders else _wrong_choice(loader, override)
            if problem is None:
                choices.append(str(override.input_line))
            else:
                word = {group: word for word, group in words.items()}.get(problem.path)
                problems.append(dataclasses.replace(problem, path=word or problem.path))
                wrong.add(override.key_or_group)
        try:
            config = hydra_compose(job_name, choices)
        except _COMPOSE_ERRORS as error:
            raise ConfigError([*problems, _composition_problem(error)]) from error
    for override in given.values:
        problems.extend(overrides.set_value(config, override, groups))
    for key, texts in given.texts.items():
        OmegaConf.update(config, key, texts)
    return Draft(config, problems, wrong)


def spelt_out(job_name: str, lines: Sequence[str]) -> list[str]:
    """Put the name of a group in place of its word: name=precision -> study=precision."""
    groups = GROUP_WORDS.get(job_name, {})
    keys_and_rest = [(line.partition("=")[0], line) for line in lines]
    return [
        groups[key] + line[len(key) :] if key in groups else line for key, line in keys_and_rest
    ]


def _wrong_choice(loader: ConfigLoader, override: Override) -> Problem | None:
    """Return a problem if the group has no such choice."""
    choice = override.value()
    if override.is_hydra_override() or override.is_delete() or choice is None:
        return None
    options = loader.get_group_options(override.key_or_group)
    if choice in options:
        return None
    rule = f"must be one of {', '.join(options)}"
    return Problem(override.key_or_group, choice, rule, nearest(str(choice), options))


def _composition_problem(error: BaseException) -> Problem:
    """Turn what Hydra says about files and values into one problem: the key, the file, why."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    rule, _, rest = text.partition(" Config search path:")[0].partition("full_key: ")
    inner: BaseException | None = error
    while inner is not None and not rest:  # Hydra leaves the key to the exception inside its own
        rest = getattr(inner, "full_key", None) or ""
        inner = inner.__cause__ or inner.__context__
    return Problem(rest.split()[0] if rest else "conf", "(as composed)", rule.strip())


@overload
def compose(job_name: Literal["train"], lines: Sequence[str]) -> TrainJob: ...
@overload
def compose(job_name: Literal["check"], lines: Sequence[str]) -> CheckJob: ...
@overload
def compose(job_name: Literal["generate"], lines: Sequence[str]) -> GenerateJob: ...
@overload
def compose(job_name: Literal["count"], lines: Sequence[str]) -> CountJob: ...
@overload
def compose(job_name: Literal["submit"], lines: Sequence[str]) -> SubmitJob: ...
@overload
def compose(job_name: str, lines: Sequence[str]) -> checks.Job: ...
def compose(job_name: str, lines: Sequence[str]) -> checks.Job:
    """Compose a job from overrides and check it as a whole.

    Args:
        job_name: name of a root in `conf/`.
        lines: overrides as on the command line, `train.tokens=2M`, `experiment=quickstart`.

    Raises:
        ConfigError: with every problem found.
    """
    composed = draft(job_name, lines)
    config = composed.config
    missing = [key for key in overrides.setting_names(config) if _is_missing(config, key)]
    try:
        if not missing and not composed.wrong_groups:
            job = cast("checks.Job", OmegaConf.to_object(config))
            found = _job_problems(job)
        else:
            found = list(_section_problems(config))
    except OmegaConfBaseException as error:
        found = [_composition_problem(error)]
    advice = ""
    if missing and not composed.wrong_groups:  # a wrong choice leaves its section empty
        found.extend(Problem(key, "???", "is not set") for key in missing)
        typed = job_name.replace("_", " ", 1)
        advice = _WHAT_IS_READY.get(job_name, f"`hybrid-train {typed} --help` lists the settings")
    refused = {problem.path for problem in composed.problems}  # left out, so reported once
    found = composed.problems + [problem for problem in found if problem.path not in refused]
    if found:
        raise ConfigError(found, advice)
    return job


def _job_problems(job: checks.Job) -> list[Problem]:
    """Check the sections, then the rules across them with the sections mended."""
    found = list(collect(job))
    known = {problem.path for problem in found}
    mended = checks.mended(job, found)
    across = checks.check(mended, _processes_of(mended))
    return found + [problem for problem in across if problem.path not in known]


def _processes_of(job: checks.Job) -> int:
    """Return the number of processes that a job is checked for."""
    if isinstance(job, CheckJob):
        return job.processes
    return node_counts.processes(job) if isinstance(job, SubmitJob) else launcher.world_size()


def _is_missing(config: DictConfig, key: str) -> bool:
    """Tell whether a setting has no value; what is computed from such a one does not count."""
    parent, _, name = key.rpartition(".")
    return OmegaConf.is_missing(OmegaConf.select(config, parent) if parent else config, name)


def _section_problems(config: DictConfig) -> Iterator[Problem]:
    """Yield the problems of the sections that are complete."""
    for name in map(str, config):
        if not isinstance(config._get_node(name), DictConfig):
            continue
        try:
            section = OmegaConf.to_object(config[name])
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            continue  # what is missing is reported by itself
        if dataclasses.is_dataclass(section):  # not a table of names of the user's own
            yield from collect(section, name)


def to_yaml(job: checks.Job) -> str:
    """Write a job as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(job))


def to_dict(job: checks.Job) -> dict[str, Any]:
    """Return a job as plain nested data, enums by name, credentials masked."""
    plain = OmegaConf.to_container(OmegaConf.structured(job), enum_to_str=True)
    return cast("dict[str, Any]", masked_data(plain))


def freeze(job: TrainJob, run_dir: Path) -> None:
    """Write the config of a run into its folder, without credentials that its URLs may hold.

    A reader never sees half of it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    target = run_dir / FROZEN_NAME
    half = target.with_suffix(".yaml.tmp")
    half.write_text(masked(to_yaml(job)), encoding="utf-8")
    half.replace(target)


def _frozen(run_dir: Path) -> Path:
    """Return the config in a run folder.

    Raises:
        UserError: if there is none.
    """
    path = run_dir / FROZEN_NAME
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no run folder: there is no such folder")
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {FROZEN_NAME}")
    return path


def read_frozen(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Read the config in a run folder as text and as plain data; that of another version, too.

    Raises:
        UserError: if the folder has no config, or it is damaged.
    """
    path = _frozen(run_dir)
    try:
        text = path.read_text(encoding="utf-8")
        plain = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return text, plain


def load(run_dir: Path) -> TrainJob:
    """Read the config of a run back from its folder, sections of the kind that was chosen.

    Raises:
        UserError: if the folder has no config.
        ConfigError: if the config does not fit this version's settings.
    """
    path = _frozen(run_dir)
    try:
        saved = OmegaConf.load(path)
        typed = OmegaConf.structured(TrainJob)
        for group in typed:
            _choose_kind(typed, saved, str(group))
        return cast("TrainJob", OmegaConf.to_object(OmegaConf.merge(typed, saved)))
    except (*_COMPOSE_ERRORS, UnicodeDecodeError) as error:
        raise ConfigError([_composition_problem(error)], f"read from {path}") from error


def reload(run_dir: Path) -> TrainJob:
    """Read the config of a run and check it for the processes that are here.

    Raises:
        UserError: if the folder has no config.
        ConfigError: with every problem found.
    """
    job = load(run_dir)
    job.run_dir = str(run_dir)  # it may have moved
    if found := _job_problems(job):
        raise ConfigError(found, f"read from {run_dir / FROZEN_NAME}")
    return job


def _choose_kind(typed: DictConfig, saved: Any, group: str) -> None:
    """Put the schema of the saved kind in place of the general one."""
    kind = OmegaConf.select(saved, f"{group}.kind")
    if kind is None:
        return
    known = registry.kinds(group)
    if kind not in known:
        raise ConfigError([Problem(f"{group}.kind", kind, f"must be one of {', '.join(known)}")])
    typed[group] = OmegaConf.structured(known[kind])
