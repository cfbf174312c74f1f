"""What a check found: fine, a warning, or broken; and what to type to mend it."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

Figures = Mapping[str, float]  # by name with its unit: "product_gflops"


class Grade(enum.Enum):
    """How bad it is."""

    ok = "ok"
    warning = "warning"  # a run starts, but may be slow, or fail later
    broken = "broken"  # a run does not start


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    grade: Grade
    found: str
    fix: str = ""  # what to type or do; empty if all is well
    figures: Figures = field(default_factory=dict)


def ok(found: str, figures: Figures | None = None) -> Finding:
    """Return that all is well."""
    return Finding(Grade.ok, found, figures=figures or {})


def warning(found: str, fix: str, figures: Figures | None = None) -> Finding:
    """Return what should be mended."""
    return Finding(Grade.warning, found, fix, figures or {})


def broken(found: str, fix: str) -> Finding:
    """Return what must be mended."""
    return Finding(Grade.broken, found, fix)
