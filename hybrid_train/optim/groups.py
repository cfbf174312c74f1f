"""Which kind each parameter is of, by its name, and which kinds weight decay leaves alone."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor

from hybrid_train.schema.optimizer import AdamW, ParameterKind
from hybrid_train.schema.units import show_tokens

# Names as `named_parameters` of a wrapped model gives them; a parameter is of one kind at most.
PATTERNS: dict[ParameterKind, tuple[str, ...]] = {
    ParameterKind.norms: ("*norm.weight", "*.layer_norm_weight"),
    ParameterKind.biases: ("*.bias", "*.conv1d_bias", "*.layer_norm_bias"),
    ParameterKind.A_log: ("*.A_log",),
    ParameterKind.D: ("*.D",),
    ParameterKind.dt_bias: ("*.dt_bias",),
    ParameterKind.convolutions: ("*.conv1d_weight",),
    ParameterKind.routers: ("*.router.weight",),
    ParameterKind.embeddings: ("*.word_embeddings.weight",),
    ParameterKind.heads: ("*output_layer.weight",),
}


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
