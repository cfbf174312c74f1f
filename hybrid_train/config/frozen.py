"""The config of a run in its own folder: frozen there at the start, read back from there."""

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.config import checks, launcher, registry, yaml_files
from hybrid_train.config.secrets import masked, masked_data
from hybrid_train.schema import formats
from hybrid_train.schema.problems import ConfigError, Problem, UserError
from hybrid_train.schema.train import TrainJob

FROZEN_NAME = "config.yaml"  # of the config in a run folder
_AT_CHECKPOINT = re.compile(r"(.+)/checkpoints/step_\d{8,}/*")  # as checkpoint/layout.py names it
_UNREADABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def to_yaml(job: checks.Job) -> str:
    """Write a job as YAML, every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(job))


def to_dict(job: checks.Job) -> dict[str, Any]:
    """Return a job as plain nested data, enums by name, credentials masked."""
    plain = OmegaConf.to_container(OmegaConf.structured(job), enum_to_str=True)
    return cast("dict[str, Any]", masked_data(plain))


def freeze(job: TrainJob, run_dir: Path) -> None:
    """Write the config of a run into its folder, without credentials that its URLs may hold.

    A reader never sees half of it. The folder gets the present format.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    formats.write_stamp(run_dir, formats.RUN_FOLDER)
    target = run_dir / FROZEN_NAME
    half = target.with_suffix(".yaml.tmp")
    half.write_text(masked(to_yaml(job)), encoding="utf-8")
    half.replace(target)


def load(run_dir: Path) -> TrainJob:
    """Read the config of a run back from its folder, sections of the kind that was chosen.

    Raises:
        UserError: if the folder has no config.
        ConfigError: if the config does not fit this version's settings.
    """
    path = _frozen(run_dir)
    try:
        saved = _with_present_names(OmegaConf.create(yaml_files.text_of(path)))
        typed = OmegaConf.structured(TrainJob)
        for group in map(str, typed):
            if isinstance(typed._get_node(group), DictConfig):
                _choose_kind(typed, saved, group)
        whole = cast("DictConfig", OmegaConf.merge(typed, saved))
        if found := list(registry.type_lists(whole)):
            raise ConfigError(found)
        return cast("TrainJob", OmegaConf.to_object(whole))
    except ConfigError as error:
        raise ConfigError(error.problems, f"read from {path}") from error
    except _UNREADABLE as error:
        raise ConfigError([yaml_files.explained(error)], f"read from {path}") from error


def run_of(url: str) -> str:
    """Return the URL of the run that a URL of it, or of one of its checkpoints, means."""
    match = _AT_CHECKPOINT.fullmatch(url)
    return match[1] if match else url.rstrip("/")


def load_behind(url: str, setting: str) -> TrainJob:
    """Read the config of a run behind a URL of it, or of one of its checkpoints.

    Raises:
        UserError: if it cannot be read, or there is none; `setting` is what names the URL.
        ConfigError: if the config does not fit this version's settings.
    """
    from hybrid_train.config.fsspec import Hints, content_of  # takes a moment to import

    hints = Hints(f"{setting} must be the URL of a run or of one of its checkpoints/step_*", "")
    with TemporaryDirectory() as name:
        for file in (FROZEN_NAME, formats.FILE_NAME):
            (Path(name) / file).write_bytes(content_of(f"{run_of(url)}/{file}", hints))
        return load(Path(name))


def _with_present_names(saved: Any) -> Any:
    """Give a setting its present name where an earlier version of the program wrote the config."""
    phases = OmegaConf.select(saved, "train.phases") or []
    lists = [OmegaConf.select(saved, "precision.exceptions")]
    lists += [OmegaConf.select(phase, "precision_exceptions") for phase in phases]
    for rule in (rule for rules in lists for rule in rules or []):
        if "products" in rule:  # until 2026-11-29
            rule["gemms"] = rule.pop("products")
    return saved


def _choose_kind(typed: DictConfig, saved: Any, group: str) -> None:
    """Put the schema of the saved kind in place of the general one."""
    kind = OmegaConf.select(saved, f"{group}.kind")
    if kind is None:
        return
    if group in registry.EXTENSION_SECTIONS:
        try:
            typed[group] = registry.typed_section(kind, group)
        except ValueError as error:
            raise ConfigError([Problem(f"{group}.kind", kind, str(error))]) from error
        return
    known = registry.kinds(group)
    if kind not in known:
        raise ConfigError([Problem(f"{group}.kind", kind, f"must be one of {', '.join(known)}")])
    typed[group] = OmegaConf.structured(known[kind])


def reload(run_dir: Path, change: Callable[[TrainJob], TrainJob] | None = None) -> TrainJob:
    """Read the config of a run and check it for the processes that are here.

    Args:
        run_dir: the run folder.
        change: what becomes of the config before it is checked.

    Raises:
        UserError: if the folder has no config.
        ConfigError: with every problem found.
    """
    saved = load(run_dir)
    job = change(saved) if change else saved
    job.run_dir = str(run_dir)  # it may have moved
    if found := list(checks.check(job, launcher.world_size())):
        raise ConfigError(found, f"read from {run_dir / FROZEN_NAME}")
    return job


def read_frozen(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """Read the config in a run folder as text and as plain data; that of another version, too.

    Raises:
        UserError: if the folder has no config, or it is damaged.
    """
    path = _frozen(run_dir)
    text = yaml_files.text_of(path)
    try:
        plain = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} is damaged: it holds no settings")
    return text, plain


def _frozen(run_dir: Path) -> Path:
    """Return the config in a run folder.

    Raises:
        UserError: if there is none, or the folder is of a format that is not read.
    """
    path = run_dir / FROZEN_NAME
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no run folder: there is no such folder")
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {FROZEN_NAME}")
    formats.require_readable_folder(run_dir, formats.RUN_FOLDER)
    return path
