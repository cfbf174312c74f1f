"""Keys of a config.json that are sizes of ours: how they are read, and what is senseless there."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from hybrid_train.schema.model import Model

_TOO_LARGE = 2**1023  # an int from here on may not become a float
LARGEST = 2**24  # no size of a family is near; a larger one is a mistake, or meant to hurt


@dataclass(frozen=True)
class Field:
    """A size that both sides have.

    Attributes:
        ours: dotted path below the model section.
        theirs: the key.
        default: of transformers' class, where a config leaves it out.
        older: former spellings.
    """

    ours: str
    theirs: str
    default: object
    older: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any]) -> Any:
        """Return what a config says, under any of its spellings, or else the default."""
        for key in (self.theirs, *self.older):
            if config.get(key) is not None:
                return config[key]
        return self.default


def read_fields(fields: Sequence[Field], config: Mapping[str, Any], model: Model) -> Iterator[str]:
    """Set the sizes of a model to those of a config; yield what is senseless, in words."""
    for field in fields:
        value = field.read(config)
        yield from senseless(field.theirs, value, field.default)
        section, _, name = field.ours.rpartition(".")
        owner = reduce(getattr, section.split("."), model) if section else model
        setattr(owner, name, value)


def written_fields(fields: Sequence[Field], model: Model) -> dict[str, Any]:
    """Return the sizes of a model, by their keys."""
    found: dict[str, Any] = {
        one.theirs: reduce(getattr, one.ours.split("."), model) for one in fields
    }
    if model.init_std is None:
        found["initializer_range"] = 0.9 / math.sqrt(model.hidden_size)
    return found


def senseless(key: str, value: Any, default: object) -> Iterator[str]:
    """Yield why a value cannot be of the kind that the default of a key is, in words."""
    if value is None or (isinstance(default, bool) and isinstance(value, bool)):
        return
    if isinstance(default, bool):
        yield f"{key} is {value!r}; it must be true or false"
    elif isinstance(default, float):
        if not is_number(value) or not 0 < value < math.inf:
            yield f"{key} is {value!r}; it must be a number above 0"
    elif type(value) is not int or not 0 <= value <= LARGEST:
        yield f"{key} is {value!r}; it must be a whole number up to {LARGEST}"


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, which true and false are not, and which a float can be."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < _TOO_LARGE
    return isinstance(value, float)
