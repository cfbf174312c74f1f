"""From names and overrides to a typed, checked job.

Nothing is written and no process group is needed: every process composes for itself.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

from hybrid_train.config import checks, frozen, launcher, overrides, own_conf, registry, yaml_files
from hybrid_train.config.commands import ROOTS, setting
from hybrid_train.config.own_conf import conf_dir, conf_folders
from hybrid_train.config.rules_of_data import no_run
from hybrid_train.schema.checkpoint import URL
from hybrid_train.schema.extension import is_import_path
from hybrid_train.schema.job_roots import CheckJob, CountJob, GenerateJob, ResumeJob, SubmitJob
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import ConfigError, Problem, collect
from hybrid_train.schema.train import TrainJob

_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


@dataclass
class Draft:
    """A composed config and what was wrong on the way to it."""

    config: DictConfig
    problems: list[Problem]
    wrong_groups: set[str]  # groups whose choice does not exist
    files: yaml_files.Walk  # that were composed
    choices: list[str]  # of groups, as Hydra reads them


@contextmanager
def config_loader(job_name: str, own: Sequence[Path] = ()) -> Iterator[ConfigLoader]:
    """Open Hydra on the conf folders for as long as the block lasts.

    Args:
        job_name: name of a root in `conf/`.
        own: folders of the user's own beside those of `own_conf.folders`.
    """
    registry.register(job_name)
    GlobalHydra.instance().clear()
    has_file = (conf_dir() / f"{job_name}.yaml").is_file()
    root = nullcontext() if has_file else registry.root_without_file(job_name)
    with root, initialize_config_dir(str(conf_dir()), job_name=job_name, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        own_conf.add_folders(loader, conf_folders(own)[1:])
        yield loader


def group_names(job_name: str) -> list[str]:
    """Return the config groups of a job, in the order of its defaults list."""
    found: list[str] = []
    file = conf_dir() / f"{job_name}.yaml"
    root = cast("DictConfig", OmegaConf.load(file)) if file.is_file() else None
    for entry in root.defaults if root is not None else ():
        if isinstance(entry, DictConfig):
            found += [str(group) for group in entry if "/schema/" not in str(group)]
        elif (conf_dir() / f"{entry}.yaml").is_file():  # another job, which this one is based on
            found += group_names(str(entry))
    return found


def draft(job_name: str, lines: Sequence[str]) -> Draft:
    """Compose without checks; settings that do not fit are left out and reported."""
    groups = group_names(job_name)
    rest, own = own_conf.taken_out(lines)
    given = overrides.read(spelt_out(job_name, rest), groups, ROOTS[job_name].texts)
    problems = [_with_meant(problem, groups) for problem in given.problems]
    with config_loader(job_name, own) as loader:
        chosen = [(one, _wrong_choice(loader, one)) for one in given.groups]
        problems += [problem for _, problem in chosen if problem is not None]
        choices = [_as_read(one) for one, problem in chosen if problem is None]
        files = yaml_files.walk(job_name, choices, conf_folders(own))
        with _own_sections(job_name, choices, given, files, problems):
            config = _composed(job_name, choices, problems, files)
        _take_chosen_sections(config, job_name, given)
    problems += registry.type_lists(config)
    for override in given.values:
        problems.extend(overrides.set_value(config, override, groups))
    for key, texts in given.texts.items():
        OmegaConf.update(config, key, [overrides.as_it_stands(text) for text in texts])
    problems += registry.type_lists(config)
    unreadable = _take_loaded_model(config, given, groups)
    found, wrong = _in_words(job_name, [*problems, *unreadable], groups)
    return Draft(config, found, wrong | {"model"} if unreadable else wrong, files, choices)


def _with_meant(problem: Problem, groups: Sequence[str]) -> Problem:
    """Put the choice that a bare word means beside it: quickstart -> experiment=quickstart."""
    if problem.rule != overrides.BARE_RULE or "/" in problem.path:
        return problem
    for group in reversed(groups):  # an experiment, which is the last, is meant most often
        if any((one / group / f"{problem.path}.yaml").is_file() for one in conf_folders()):
            return dataclasses.replace(problem, nearest=f"{group}={problem.path}")
    return problem


@contextmanager
def _own_sections(
    job_name: str,
    choices: list[str],
    given: overrides.Given,
    files: yaml_files.Walk,
    problems: list[Problem],
) -> Iterator[None]:
    """Let Hydra compose sections of a user's own kind on the settings of that kind.

    A choice that does not name the kind itself gives way; what cannot be imported is a problem.
    """
    groups = group_names(job_name)
    sections = {}
    for place in registry.EXTENSION_SECTIONS:
        kind = _own_kind(place, given, files) if place in groups else None
        if kind is None:
            continue
        try:
            section = registry.typed_section(kind, place)
        except ValueError as error:
            raise ConfigError([*problems, Problem(f"{place}.kind", kind, str(error))]) from error
        chosen = [one for one in files.files if one.startswith(f"{place}/")][-1]
        if files.sets(chosen, "kind") != kind:
            choices[:] = [one for one in choices if not one.startswith(f"{place}=")]
            choices.append(f"~{place}")
        sections[place] = section
    with registry.sections_of(job_name, sections):
        yield


def _take_chosen_sections(config: DictConfig, job_name: str, given: overrides.Given) -> None:
    """Let a choice of the command line stand where a file has a section of another kind.

    `objective=next_token` takes the place of all that an experiment says of an objective.
    """
    for choice in given.groups:
        place = choice.key_or_group
        if place not in registry.EXTENSION_SECTIONS or choice.value() not in registry.kinds(place):
            continue
        if is_import_path(config[place].kind):
            config[place] = hydra_compose(job_name, [f"{place}={choice.value()}"])[place]


def _own_kind(place: str, given: overrides.Given, files: yaml_files.Walk) -> str | None:
    """Return the kind of a section if it is an import path: the command line's, else a file's."""
    for override in reversed(given.values):
        if override.key_or_group == f"{place}.kind":
            return str(override.value()) if is_import_path(override.value()) else None
    found = files.place(f"{place}.kind")
    return found[1] if found and is_import_path(found[1]) else None


def _as_read(choice: Override) -> str:
    """Write a choice as Hydra reads it; the user may have left out quotes."""
    line = str(choice.input_line)
    return line if choice.is_delete() else setting(line.partition("=")[0], choice.value())


def _composed(
    job_name: str, choices: list[str], problems: Sequence[Problem], files: yaml_files.Walk
) -> DictConfig:
    """Compose the choices.

    Raises:
        ConfigError: if the files are faulty, or do not fit.
    """
    if files.problems:
        raise ConfigError([*problems, *files.problems])
    try:
        return hydra_compose(job_name, choices)
    except (*_COMPOSE_ERRORS, ValueError) as error:  # Hydra's own of a choice that is no name
        raise ConfigError([*problems, yaml_files.explained(error, files)]) from error


def _in_words(
    job_name: str, problems: list[Problem], groups: Sequence[str]
) -> tuple[list[Problem], set[str]]:
    """Name groups by their words, and tell of which of them nothing right was chosen."""
    words = {group: word for word, group in ROOTS[job_name].words.items()}
    wrong = {
        group
        for group in groups
        for one in problems
        if one.path == group or str(one.nearest).startswith(f"{group}=")
    }
    unique = [one for number, one in enumerate(problems) if one not in problems[:number]]
    return [dataclasses.replace(one, path=words.get(one.path, one.path)) for one in unique], wrong


def _take_loaded_model(
    config: DictConfig, given: overrides.Given, groups: Sequence[str]
) -> list[Problem]:
    """Put the model of the run to start from in place of what an experiment says of it.

    What the command line itself says of the model stays, so that a contradiction is found; MTP may
    be added that way.
    """
    section = config.get("checkpoint") if "model" in config else None
    source = section.get("load") if isinstance(section, DictConfig) else None
    if source is None or any(one.key_or_group == "model" and one.value() for one in given.groups):
        return []
    try:
        found = runs_of(source)
    except OSError as error:
        return [Problem("checkpoint.load", source, f"cannot be read: {error.strerror}")]
    if not found:  # a rule tells what is wrong with a URL
        missing = no_run("checkpoint.load", source, frozen.FROZEN_NAME)
        return [] if "://" in source else [missing]
    model = found[0].model
    model.pattern = model.pattern.replace("|", "")  # cuts are of the layout, not of the model
    config.model = OmegaConf.structured(model)
    for override in given.values:
        if override.key_or_group.partition(".")[0] == "model":
            list(overrides.set_value(config, override, groups))  # what does not fit is known
    return []


def runs_of(source: str) -> list[TrainJob]:
    """Return a run by its folder, a checkpoint of it, or the URL of either; none if it is none."""
    if URL.fullmatch(source):
        return [frozen.load_behind(source, "checkpoint.load")]
    places = [Path(source), Path(source).parent.parent]
    return [frozen.load(place) for place in places if (place / frozen.FROZEN_NAME).is_file()]


def spelt_out(job_name: str, lines: Sequence[str]) -> list[str]:
    """Put the name of a group, or of the setting that is meant, in place of a word.

    name=precision -> study=precision; resume: train.tokens=2M -> overrides=train.tokens=2M.
    """
    if job_name == "resume":  # every setting but its own is one of the run
        own = {field.name for field in dataclasses.fields(ResumeJob)}
        is_own = [line.lstrip("+").partition("=")[0] in own for line in lines]
        return [
            line if mine else f"overrides={line}" for line, mine in zip(lines, is_own, strict=True)
        ]
    groups = ROOTS[job_name].words
    keys_and_rest = [(line.partition("=")[0], line) for line in lines]
    return [
        groups[key] + line[len(key) :] if key in groups else line for key, line in keys_and_rest
    ]


def _wrong_choice(loader: ConfigLoader, override: Override) -> Problem | None:
    """Return a problem if the group has no such choice."""
    choice = override.value()
    if override.is_delete():
        return None
    options = loader.get_group_options(override.key_or_group)
    if choice in options:
        return None
    rule = f"must be one of {', '.join(options)}"
    value = "null" if choice is None else choice if isinstance(choice, str) else str(choice)
    return Problem(override.key_or_group, value, rule, nearest(value, options))


@overload
def compose(
    job_name: Literal["train"], lines: Sequence[str], *, processes: int | None = ...
) -> TrainJob: ...
@overload
def compose(
    job_name: Literal["check"], lines: Sequence[str], *, processes: int | None = ...
) -> CheckJob: ...
@overload
def compose(
    job_name: Literal["generate"], lines: Sequence[str], *, processes: int | None = ...
) -> GenerateJob: ...
@overload
def compose(
    job_name: Literal["count"], lines: Sequence[str], *, processes: int | None = ...
) -> CountJob: ...
@overload
def compose(
    job_name: Literal["submit"], lines: Sequence[str], *, processes: int | None = ...
) -> SubmitJob: ...
@overload
def compose(job_name: str, lines: Sequence[str], *, processes: int | None = ...) -> checks.Job: ...
def compose(job_name: str, lines: Sequence[str], *, processes: int | None = None) -> checks.Job:
    """Compose a job from overrides and check it as a whole.

    Args:
        job_name: name of a root in `conf/`.
        lines: overrides as on the command line, `train.tokens=2M`, `experiment=quickstart`.
        processes: that it will run on; None: as many as there are here.

    Raises:
        ConfigError: with every problem found.
    """
    composed = draft(job_name, lines)
    config = composed.config
    missing = list(_missing(config))
    try:
        if not missing and not composed.wrong_groups:
            job = cast("checks.Job", OmegaConf.to_object(config))
            found = list(checks.check(job, processes or launcher.world_size()))
        else:
            found = list(_section_problems(config))
    except OmegaConfBaseException as error:
        found = [yaml_files.explained(error, composed.files)]
    advice = ""
    if missing and not composed.wrong_groups:  # a wrong choice leaves its section empty
        rule = "are not set" if len(missing) > 1 else "is not set"
        found.append(Problem(", ".join(missing), "???", rule))
        typed = job_name.replace("_", " ", 1)
        advice = ROOTS[job_name].ready or f"`hybrid-train {typed} --help` lists the settings"
    refused = {problem.path for problem in composed.problems}  # left out, so reported once
    found = composed.problems + [problem for problem in found if problem.path not in refused]
    if found:
        raise ConfigError(found, advice)
    return job


def _missing(config: DictConfig) -> Iterator[str]:
    """Yield the settings that have no value; what is computed from such a one does not count."""
    sections: dict[str, Any] = {"": config}
    for key in overrides.setting_names(config):
        section, _, name = key.rpartition(".")
        if section not in sections:
            sections[section] = OmegaConf.select(config, section)
        if OmegaConf.is_missing(sections[section], name):
            yield key


def _section_problems(config: DictConfig) -> Iterator[Problem]:
    """Yield the problems of the sections that are complete."""
    for name in map(str, config):
        if not isinstance(config._get_node(name), DictConfig) or config[name] is None:
            continue
        try:
            section = OmegaConf.to_object(config[name])
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            continue  # what is missing is reported by itself
        if dataclasses.is_dataclass(section):  # not a table of names of the user's own
            yield from collect(section, name)
