"""Objects that are named by their import path: "package.module:Name"."""

import importlib
from typing import Any

from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError


def imported(path: str) -> Any:
    """Import what a path names.

    Args:
        path: "package.module:Name"; the package lies where Python looks for packages.

    Raises:
        UserError: if it is no such path, if there is no such module or name, or if the import of
            the module fails.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name.isidentifier()):
        raise UserError(f"{path!r} is no import path; write package.module:Name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{path}: {module_name} imports {error.name}, which is not there"
            ) from error
        raise UserError(
            f"{path}: there is no module {error.name}; install its package, or add the folder that "
            "it lies in to PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a module of somebody's own may raise
        raise UserError(
            f"{path}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        close = nearest(name, vars(module))
        hint = f"; nearest: {module_name}:{close}" if close else ""
        raise UserError(f"{path}: {module_name} has no {name}{hint}")
    return getattr(module, name)
