"""What a package of a user's own may bring into a run: parts that are named by their import path.

Where a part of ours has a word as its `kind`, such as next_token, one of a user's own has the path
of a dataclass with its settings, "my_package.focal:Focal". The dataclass derives from one of the
classes below, holds data only, and names the code that it is for. Like every section it is typed,
checked with the rest before anything starts, and frozen into the run folder.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_path(kind: object) -> bool:
    """Tell whether a kind is an import path, package.module:Class."""
    return isinstance(kind, str) and _PATH.fullmatch(kind) is not None


@dataclass(kw_only=True)
class Extension:
    """Settings of a part; a method `problems` may yield what is wrong with them."""

    # Of the class that does the work, package.module:Class. It is imported when a run is built, so
    # that settings can be checked on a machine without torch.
    implementation: ClassVar[str] = ""
    kind: str = MISSING


@dataclass(kw_only=True)
class Edit(Extension):
    """Changes a model that was built, before it is wrapped for data parallelism."""


@dataclass(kw_only=True)
class Hook(Extension):
    """Reacts to the events of the loop."""


@dataclass(kw_only=True)
class RowTransform(Extension):
    """Changes a row of the data between reading and stacking."""
