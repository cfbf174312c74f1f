"""What a package of a user's own may bring into a run: parts that are named by their import path.

Where a part of ours has a word as its `kind`, such as next_token, one of a user's own has the path
of a dataclass with its settings, "my_package.focal:Focal". The dataclass derives from one of the
classes below, holds data only, and names the code that it is for. Like every section it is typed,
checked with the rest before anything starts, and frozen into the run folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from hybrid_train.schema.import_path import imported
from hybrid_train.schema.problems import UserError


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
        refusal = UserError(f"{settings.kind} is carried out by {path}: {error}")
        refusal.everywhere = True
        raise refusal from error
