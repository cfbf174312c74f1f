"""What a config offers and where it comes from: for help, `--cfg` and `--info`."""

import dataclasses
import enum
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import EnumNode

from hybrid_train.config import yaml_files
from hybrid_train.config.commands import ROOTS, setting
from hybrid_train.config.compose import Draft, config_loader, draft, group_names
from hybrid_train.config.overrides import node_at, setting_names
from hybrid_train.config.own_conf import conf_folders
from hybrid_train.config.secrets import masked
from hybrid_train.schema.problems import ConfigError

_SHARE = re.compile(r"\$\{share:([\d.]+),\$\{([\w.]+)\}\}")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
UNSET = "must be set"
_COMMENTED = re.compile(r"^    (\w+): .*?#\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """One key of a job."""

    name: str  # dotted path
    default: str
    comment: str


def choices(job_name: str) -> dict[str, dict[str, str]]:
    """Return the choices of every group of a job, each with the first comment of its file."""
    words = {group: word for word, group in ROOTS[job_name].words.items()}
    return {words.get(group, group): descriptions(group) for group in group_names(job_name)}


def chosen(job_name: str, lines: Sequence[str]) -> dict[str, str | None]:
    """Return the choice of every group of a job after the overrides; None where there is none.

    Raises:
        ConfigError: if an override does not fit.
    """
    composed = _sound(job_name, lines)
    with config_loader(job_name) as loader:
        listed = loader.compute_defaults_list(job_name, composed.choices, RunMode.RUN)
    known = listed.overrides.known_choices
    words = {group: word for word, group in ROOTS[job_name].words.items()}
    return {words.get(group, group): known.get(group) for group in group_names(job_name)}


def descriptions(group: str) -> dict[str, str]:
    """Return the files of a group by name, each with its first comment."""
    found = [file for folder in conf_folders() for file in sorted((folder / group).glob("*.yaml"))]
    return {file.stem: _first_comment(file) for file in sorted(found, key=lambda one: one.stem)}


def each_choice[T](
    job_name: str, group: str, read: Callable[[DictConfig], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Compose a job with every choice of a group.

    Args:
        job_name: name of a root in `conf/`.
        group: the group.
        read: what is wanted of the config.

    Returns:
        What was read, by choice; and why some could not be, such as files of the user's own.
    """
    found: dict[str, T] = {}
    left_out: dict[str, str] = {}
    for name in descriptions(group):
        try:
            found[name] = read(sound_draft(job_name, [setting(group, name)]))
        except ConfigError as error:
            left_out[name] = str(error.problems[0])
        except (OmegaConfBaseException, ValueError) as error:
            left_out[name] = str(yaml_files.explained(error))
    return found, left_out


def _first_comment(file: Path) -> str:
    """Return the first comment of a YAML file that is no directive to Hydra."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    for line in lines:
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""


def settings(job_name: str, lines: Sequence[str]) -> Iterator[Setting]:
    """Yield every key of a job with the value that it will have after the overrides.

    Raises:
        ConfigError: if an override does not fit.
    """
    config = sound_draft(job_name, lines)
    comments = dict(_comments(config))
    written: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    for name in setting_names(config):
        value = written
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, dict) and not name.endswith(".kind"):  # the group sets the kind
            members = _members(node_at(config, name))
            remarks = [", ".join(members), comments.get(name, "").replace("None:", "null:")]
            if "${" in str(value):
                value = _resolved(config, name, str(value))
            yield Setting(name.rstrip("_"), _shown(value), "; ".join(filter(None, remarks)))


def _resolved(config: DictConfig, name: str, written: str) -> object:
    """Return what a value that is computed comes to; in words, if that is not known yet."""
    above, _, last = name.rpartition(".")
    try:
        found = (OmegaConf.select(config, above) if above else config)[last]
    except OmegaConfBaseException:  # it follows from a setting that has no value
        shares = [f"{float(part):.4g} of {key}" for part, key in _SHARE.findall(written)]
        return ", ".join(shares) or f"follows {', '.join(_REFERENCE.findall(written))}"
    return OmegaConf.to_container(found) if isinstance(found, Container) else found


def _members(node: Node | None) -> list[str]:
    """Return what an enumeration, or a list of them, can hold."""
    kind: Any = node.enum_type if isinstance(node, EnumNode) else None
    if isinstance(node, ListConfig):
        kind = node._metadata.element_type
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return list(kind.__members__) if is_enum else []


def sound_draft(job_name: str, lines: Sequence[str]) -> DictConfig:
    """Compose without checks of values; raise if an override does not fit."""
    return _sound(job_name, lines).config


def _sound(job_name: str, lines: Sequence[str]) -> Draft:
    composed = draft(job_name, lines)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed


def _shown(value: object) -> str:
    """Write a value as one would on the command line."""
    if value == "???":
        return UNSET
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _comments(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the comment that stands beside each field in its schema."""
    schema = OmegaConf.get_type(config)
    if schema is None or not dataclasses.is_dataclass(schema):
        return
    for owner in reversed(schema.__mro__[:-1]):
        for name, comment in _COMMENTED.findall(getsource(owner)):
            yield f"{prefix}{name}", comment
    for name in map(str, config):
        section = config._get_node(name)
        if isinstance(section, DictConfig):
            yield from _comments(section, f"{prefix}{name}.")


def config_text(job_name: str, lines: Sequence[str], part: str, *, resolve: bool) -> str:
    """Return the composed config as YAML.

    Args:
        job_name: name of a root in `conf/`.
        lines: overrides.
        part: "job", "hydra" or "all".
        resolve: whether interpolations give way to their values.
    """
    config = sound_draft(job_name, lines)
    if part == "job":
        return masked(OmegaConf.to_yaml(config, resolve=resolve))
    with config_loader(job_name) as loader:
        whole = loader.load_configuration(job_name, [], RunMode.RUN, from_shell=False)
    hydra = OmegaConf.to_yaml(OmegaConf.create({"hydra": whole.hydra}), resolve=False)
    both = hydra if part == "hydra" else hydra + OmegaConf.to_yaml(config, resolve=resolve)
    return masked(both)


def print_info(job_name: str, lines: Sequence[str], what: str) -> None:
    """Let Hydra print where the config comes from."""
    choices = _sound(job_name, lines).choices
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with config_loader(job_name):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.show_info(what, config_name=job_name, overrides=choices, run_mode=RunMode.RUN)
    finally:  # Hydra 1.3 prints through the root logger and leaves it at DEBUG
        root.handlers[:] = handlers
        root.setLevel(level)
