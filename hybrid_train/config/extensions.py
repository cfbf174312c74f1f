"""Parts of a user's own package: their settings are found by import path and typed like ours.

`objective: {kind: "my_package.focal:Focal", gamma: 2}` makes the objective a `Focal`, in a file or
on the command line; `edits`, `hooks` and `row_transforms` are lists of such parts.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.schema.extension import (
    EditSettings,
    Extension,
    HookSettings,
    RowTransformSettings,
)
from hybrid_train.schema.import_path import imported, is_path
from hybrid_train.schema.objective import OBJECTIVES, ObjectiveSettings
from hybrid_train.schema.problems import Problem

# What a class of settings at each place derives from, and the kinds of ours.
SECTIONS: dict[str, tuple[type[Extension], dict[str, Any]]] = {
    "objective": (ObjectiveSettings, OBJECTIVES)
}
LISTS: dict[str, type[Extension]] = {
    "edits": EditSettings,
    "hooks": HookSettings,
    "row_transforms": RowTransformSettings,
}
_HOW = "package.module:Class, the import path of a class of settings"


def settings_of(kind: str, base: type[Extension]) -> type[Extension]:
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
    if not is_path(place):
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


def typed_section(kind: str, place: str) -> DictConfig:
    """Return the settings of a section of one kind, every one at its default.

    Args:
        kind: a word of ours, or an import path.
        place: the section.

    Raises:
        ValueError: with the rule that the kind breaks.
    """
    base, ours = SECTIONS[place]
    if is_path(kind):
        section: DictConfig = OmegaConf.structured(settings_of(kind, base))
        section.kind = kind
        return section
    if kind not in ours:
        raise ValueError(f"must be one of {', '.join(ours)}, or {_HOW}")
    return cast("DictConfig", OmegaConf.structured(ours[kind]))


def type_lists(config: DictConfig) -> Iterator[Problem]:
    """Type the entries of every list of parts, in place; yield what is wrong with them."""
    for name, base in LISTS.items():
        entries = config.get(name)
        for number, entry in enumerate(entries if isinstance(entries, ListConfig) else ()):
            path = f"{name}.{number}"
            is_typed = isinstance(entry, DictConfig) and is_dataclass(OmegaConf.get_type(entry))
            if is_typed:
                continue
            if not isinstance(entry, DictConfig) or not is_path(entry.get("kind")):
                yield Problem(path, entry, f"must have a kind, {_HOW}")
                continue
            try:
                entries[number] = _typed_entry(entry, base)
            except OmegaConfBaseException as error:
                key = f"{path}.{error.key}" if error.key else path
                yield Problem(key, _value_at(entry, error.key), _words(error, entry.kind, base))
            except ValueError as error:
                yield Problem(f"{path}.kind", entry.kind, str(error))


def _typed_entry(entry: DictConfig, base: type[Extension]) -> DictConfig:
    section = OmegaConf.structured(settings_of(entry.kind, base))
    return cast("DictConfig", OmegaConf.merge(section, entry))


def _value_at(entry: DictConfig, key: Any) -> object:
    return entry.get(key) if key in entry else OmegaConf.to_container(entry)


def _words(error: OmegaConfBaseException, kind: str, base: type[Extension]) -> str:
    """Say what does not fit; of a name that is not there, which are."""
    settings = settings_of(kind, base)
    known = [one.name for one in fields(settings) if one.name != "kind"]
    if error.key is not None and error.key not in known:
        there = f"; it has {', '.join(known)}" if known else "; it has none"
        return f"{settings.__name__} has no such setting{there}"
    return str(error).partition("\n")[0]
