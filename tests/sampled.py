"""A sample of the values of a parameter for `make test`; `.ci/run` has them all."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark as slow every value that is not kept; a tuple is a value of several parameters."""
    listed = list(values)
    assert all(one in listed for one in kept), "a value that is kept must be one of the values"
    return [one if one in kept else _slow(one) for one in listed]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
