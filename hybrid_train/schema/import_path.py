"""Objects that are named by their import path: "package.module:Name"."""

import importlib
import re
from typing import Any

from hybrid_train.schema.names import nearest

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_path(text: object) -> bool:
    """Tell whether something is an import path."""
    return isinstance(text, str) and _PATH.fullmatch(text) is not None


def imported(path: str) -> Any:
    """Import what a path names.

    Args:
        path: "package.module:Name"; the package lies where Python looks for packages.

    Raises:
        ValueError: with the reason, if there is no such module or name, or if the import of the
            module fails.
    """
    assert is_path(path), path
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
