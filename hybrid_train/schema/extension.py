"""What a user's own package may bring into a run: parts that are named by import path.

Where a part of ours has a word as its `kind`, such as next_token, one of a user's own has the path
of a dataclass with its settings, "my_package.focal:Focal". The dataclass derives from one of the
classes below, holds data only, and names the code that it is for. Like every section it is typed,
checked with the rest before anything starts, and frozen into the run folder.

`imported` takes the code behind an import path, and says what is wrong where it cannot.
"""

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(kw_only=True)
class Extension:
    """Settings of a part; a method `problems` may yield what is wrong with them."""

    # Of the class that does the work, package.module:Class. It is imported when a run is built, so
    # that settings can be checked on a machine without torch.
    implementation: ClassVar[str] = ""
    kind: str = MISSING


@dataclass(kw_only=True)
class EditSettings(Extension):
    """Changes a model that was built, before it is wrapped for data parallelism."""


@dataclass(kw_only=True)
class HookSettings(Extension):
    """Reacts to the events of the loop."""


@dataclass(kw_only=True)
class RowTransformSettings(Extension):
    """Changes a row of the data between reading and stacking."""


def built_from(settings: Iterable[Extension]) -> list[Any]:
    """Build the part that each of these settings is for, of nothing but its settings.

    Raises:
        UserError: if one cannot be imported.
    """
    return [implementation_of(one)(one) for one in settings]


def implementation_of(settings: Extension) -> Any:
    """Import the class that settings are for.

    Raises:
        UserError: if it cannot be imported.
    """
    path = type(settings).implementation
    try:
        return imported(path)
    except ValueError as error:
        refusal = UserError(f"{settings.kind} is run by {path}: {error}")
        refusal.on_all_ranks = True
        raise refusal from error


def imported(path: str) -> Any:
    """Import what a path names.

    Args:
        path: "package.module:Name"; the package lies where Python looks for packages.

    Raises:
        ValueError: with the reason, if there is no such module or name, or if the import of the
            module fails.
    """
    assert is_import_path(path), path
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{module_name} imports {error.name}, which is not there") from error
        raise ValueError(
            f"there is no module {error.name}; install its package, or add the folder that it lies "
            "in to PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a module of somebody's own may raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{module_name} cannot be imported: {reason}") from error
    if not hasattr(module, name):
        near = nearest(name, [one for one in vars(module) if not one.startswith("_")])
        hint = f"; it has {near}" if near else ""
        raise ValueError(f"{module_name} has no {name}{hint}")
    return getattr(module, name)


def is_import_path(text: object) -> bool:
    """Tell whether something is an import path."""
    return isinstance(text, str) and _IMPORT_PATH.fullmatch(text) is not None
