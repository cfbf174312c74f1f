"""The table of schemas by group and kind, as Hydra knows them; those of a user's own package, too.

A YAML file of a group starts from `/schema/GROUP/KIND`; a saved run finds the class of a section
again by the `kind` it wrote. Groups with one schema only call it `base`.

The kind of an extension may be an import path: `objective: {kind: "my_package.focal:Focal", gamma:
2}` makes the objective a `Focal`, in a file or on the command line. `edits`, `hooks` and
`row_transforms` are lists of such parts; one without settings can stand there as its kind alone.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.config.commands import ROOTS
from hybrid_train.schema.checkpoint import Checkpoint, Recovery
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.extension import (
    EditSettings,
    Extension,
    HookSettings,
    RowTransformSettings,
    imported,
    is_import_path,
)
from hybrid_train.schema.gpu import Gpu
from hybrid_train.schema.limits import MOST_TOKENS
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import OBJECTIVES, ObjectiveSettings
from hybrid_train.schema.optimizer import AdamW, Cosine, Schedule, Wsd
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.pruning import EDITS
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.tracking import Profile, Tracking
from hybrid_train.schema.units import is_tokens, tokens

SCHEMAS: dict[tuple[str, str], type[Any]] = {
    **{("job", root): command.schema for root, command in ROOTS.items() if command.schema},
    ("model", "base"): Model,
    ("parallel", "base"): Parallel,
    ("precision", "base"): Precision,
    ("data", "files"): Data,
    ("data", "quickstart"): Quickstart,
    ("optimizer", "adamw"): AdamW,
    ("schedule", "constant"): Schedule,
    ("schedule", "cosine"): Cosine,
    ("schedule", "wsd"): Wsd,
    **{("objective", kind): schema for kind, schema in OBJECTIVES.items()},
    ("checkpoint", "base"): Checkpoint,
    ("recovery", "base"): Recovery,
    ("tracking", "base"): Tracking,
    ("runtime", "base"): Runtime,
    ("gpu", "base"): Gpu,
    ("profile", "base"): Profile,
    ("cluster", "base"): Cluster,
}

# Sections that may be of a user's own kind: what its settings derive from, and the kinds of ours.
EXTENSION_SECTIONS: dict[str, tuple[type[Extension], dict[str, Any]]] = {
    "objective": (ObjectiveSettings, OBJECTIVES)
}
# The same for the entries of lists.
EXTENSION_LISTS: dict[str, tuple[type[Extension], dict[str, Any]]] = {
    "edits": (EditSettings, EDITS),
    "hooks": (HookSettings, {}),
    "row_transforms": (RowTransformSettings, {}),
}
_KIND_RULE = "package.module:Class, the import path of a class of settings"


@cache  # of all commands it would be half of the time of a composition
def register(job_name: str) -> None:
    """Make the schemas that a command needs known to Hydra: those of all groups, and its own.

    A second call changes nothing.
    """
    _register_groups()
    if ("job", job_name) in SCHEMAS:
        root = _root(SCHEMAS["job", job_name])
        ConfigStore.instance().store(group="schema/job", name=job_name, node=root)


def _root(schema: type[Any]) -> DictConfig:
    """Return the schema of a job whose sections of several kinds have none yet, but take any."""
    root = cast("DictConfig", OmegaConf.structured(schema))
    for place, (base, _) in EXTENSION_SECTIONS.items():
        if place in root:
            root[place] = base
    return root


@cache
def _register_groups() -> None:
    """Make schemas known to Hydra as `schema/GROUP/KIND`, and `${share:PART,TOKENS}` to YAML."""
    OmegaConf.register_new_resolver("share", share, replace=True)
    store = ConfigStore.instance()
    for (group, kind), schema in SCHEMAS.items():
        if group != "job":
            store.store(group=f"schema/{group}", name=kind, node=schema)
    # Hydra copies its sources twice a composition, each time with all schemas, and changes none.
    vars(store)["__deepcopy__"] = lambda _: store


def share(part: float, total: str) -> str:
    """Return a part of a number of tokens, so that the phases of a schedule follow its length."""
    # A total that is no number, or beyond the limit, is reported where it stands, once.
    is_sound = is_tokens(total) and tokens(total) <= MOST_TOKENS
    return str(round(part * tokens(total))) if is_sound else "0"


@contextmanager
def root_without_file(job_name: str) -> Iterator[None]:
    """Let the schema of a job be its root for as long as the block lasts.

    Beside a file of this name Hydra would take the schema for one of Hydra 1.0, and warn.
    """
    store = ConfigStore.instance()
    store.store(name=job_name, node=SCHEMAS[("job", job_name)])
    try:
        yield
    finally:
        del store.repo[f"{job_name}.yaml"]


@contextmanager
def sections_of(job_name: str, sections: dict[str, DictConfig]) -> Iterator[None]:
    """Let the schema of a job have sections of other kinds for as long as the block lasts."""
    store, schema = ConfigStore.instance(), SCHEMAS.get(("job", job_name))
    if schema is None or not sections:
        yield
        return
    root = _root(schema)
    for place, section in sections.items():
        root[place] = section
    store.store(group="schema/job", name=job_name, node=root)
    try:
        yield
    finally:
        store.store(group="schema/job", name=job_name, node=_root(schema))


def kinds(group: str) -> dict[str, type[Any]]:
    """Return the schemas of a group by kind; empty for a group that is not in the table."""
    return {kind: schema for (owner, kind), schema in SCHEMAS.items() if owner == group}


def typed_section(kind: str, place: str) -> DictConfig:
    """Return the settings of a section of one kind, every one at its default.

    Args:
        kind: a word of ours, or an import path.
        place: the section.

    Raises:
        ValueError: with the rule that the kind breaks.
    """
    base, ours = EXTENSION_SECTIONS[place]
    if is_import_path(kind):
        section: DictConfig = OmegaConf.structured(settings_class(kind, base))
        section.kind = kind
        return section
    if kind not in ours:
        raise ValueError(f"must be one of {', '.join(ours)}, or {_KIND_RULE}")
    return cast("DictConfig", OmegaConf.structured(ours[kind]))


def type_lists(config: DictConfig) -> Iterator[Problem]:
    """Type the entries of every list of parts, in place; yield what is wrong with them."""
    for name, (_, ours) in EXTENSION_LISTS.items():
        words = f"{', '.join(ours)}, or {_KIND_RULE}" if ours else _KIND_RULE
        entries = config.get(name)
        for number in range(len(entries) if isinstance(entries, ListConfig) else 0):
            path = f"{name}.{number}"
            if isinstance(entries[number], str):
                entries[number] = {"kind": entries[number]}
            entry = entries[number]
            is_typed = isinstance(entry, DictConfig) and is_dataclass(OmegaConf.get_type(entry))
            if is_typed:
                continue
            kind = str(entry.get("kind")) if isinstance(entry, DictConfig) else ""
            if kind not in ours and not is_import_path(kind):
                yield Problem(path, entry, f"must have a kind, {words}")
                continue
            try:
                entries[number] = _typed_entry(entry, name)
            except OmegaConfBaseException as error:
                key = f"{path}.{error.key}" if error.key else path
                yield Problem(key, _value_at(entry, error.key), _misfit(error, kind, name))
            except ValueError as error:
                yield Problem(f"{path}.kind", kind, str(error))


def _typed_entry(entry: DictConfig, list_name: str) -> DictConfig:
    section = OmegaConf.structured(_entry_class(entry.kind, list_name))
    return cast("DictConfig", OmegaConf.merge(section, entry))


def _entry_class(kind: str, list_name: str) -> type[Any]:
    base, ours = EXTENSION_LISTS[list_name]
    found: type[Any] | None = ours.get(kind)
    return settings_class(kind, base) if found is None else found


def _value_at(entry: DictConfig, key: Any) -> object:
    return entry.get(key) if key in entry else OmegaConf.to_container(entry)


def _misfit(error: OmegaConfBaseException, kind: str, list_name: str) -> str:
    """Say what does not fit; for an unknown setting, which settings there are."""
    settings = _entry_class(kind, list_name)
    known = [one.name for one in fields(settings) if one.name != "kind"]
    if error.key is not None and error.key not in known:
        there = f"; it has {', '.join(known)}" if known else "; it has none"
        return f"{settings.__name__} has no such setting{there}"
    return str(error).partition("\n")[0]


def settings_class(kind: str, base: type[Extension]) -> type[Extension]:
    """Import a class of settings.

    Args:
        kind: its import path, package.module:Class.
        base: what it must derive from.

    Raises:
        ValueError: with the rule that it breaks.
    """
    found = imported(kind)
    name, wanted = kind.partition(":")[2], f"{base.__module__}.{base.__name__}"
    if not (isinstance(found, type) and issubclass(found, base) and is_dataclass(found)):
        raise ValueError(f"{name} must be a dataclass that derives from {wanted}")
    _require_implementation(found)
    return found


def _require_implementation(settings: type[Extension]) -> None:
    """Raise a ValueError unless the class names code that is there, as far as can be seen."""
    place = settings.implementation
    if not is_import_path(place):
        form = 'implementation: ClassVar[str] = "package.module:Class"'
        raise ValueError(f"{settings.__name__} must name the code that it is for: {form}")
    module_name = place.partition(":")[0]
    try:
        there = importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        rule = f"is for {place}, and there is no module {module_name}"
        raise ValueError(f"{settings.__name__} {rule}")
