"""Which kind each parameter is of, by its name, and which kinds weight decay leaves alone."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor

from hybrid_train.anatomy.kinds import outer_parameters, possible_parameters
from hybrid_train.schema.optimizer import AdamW, ParameterKind
from hybrid_train.schema.units import show_tokens


def _patterns() -> dict[ParameterKind, tuple[str, ...]]:
    """Return patterns of the names that `named_parameters` of a wrapped model gives, by kind."""
    named = [(f"*.{one.name}", one.kind) for one in possible_parameters()]
    named += [(f"*{one.name}", one.kind) for one in outer_parameters()]
    return {
        kind: tuple(dict.fromkeys(name for name, own in named if own is kind))
        for kind in ParameterKind
    }


PATTERNS = _patterns()


def kind_of(name: str) -> ParameterKind | None:
    """Return the kind of a parameter; None for the matrices inside the layers."""
    for kind, patterns in PATTERNS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    return None


def decays(adamw: AdamW, name: str) -> bool:
    """Tell whether weight decay acts on a parameter."""
    return kind_of(name) not in adamw.no_decay


def describe(adamw: AdamW, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Say in one line how many of these parameters decay, and how many of which kind do not."""
    counts: dict[ParameterKind | None, int] = {}
    for name, parameter in parameters:
        kind = kind_of(name)
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    spared = [kind for kind in adamw.no_decay if kind in counts]
    total = sum(counts.values())
    left = total - sum(counts[kind] for kind in spared)
    line = f"weight decay {adamw.weight_decay:g} on {show_tokens(left)} of "
    line += f"{show_tokens(total)} parameters of this process"
    others = ", ".join(f"{kind.value} ({show_tokens(counts[kind])})" for kind in spared)
    return f"{line}; not on {others}" if others else line
