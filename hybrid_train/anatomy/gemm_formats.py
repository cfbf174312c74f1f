"""Which linear layer multiplies in which format, and the table that shows it.

The exceptions of a run are applied to every layer: the first one that matches a GEMM decides its
format. Embedding, head, routers, norms, convolutions and scans are no part of this: they are never
quantized.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from hybrid_train.anatomy.kinds import MTP_PROJECTION, possible_parameters
from hybrid_train.anatomy.layers import Shape, layers_of_shape, shape_of
from hybrid_train.schema.layer_ranges import layers_of
from hybrid_train.schema.model import Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.precision import Gemm, GemmFormat, Precision, PrecisionRule

MTP = "mtp"
_MAIN_KINDS = tuple(one.linear for one in possible_parameters() if one.linear)
KINDS = (*_MAIN_KINDS, MTP_PROJECTION, *(f"{MTP}.{kind}" for kind in _MAIN_KINDS))
UNQUANTIZED = (GemmFormat.fp32, GemmFormat.bf16)
# Formats whose weights have the same values in all GEMMs, and that Transformer Engine gathers:
# MXFP8's are cut along the sum of each GEMM, and gathered in bfloat16.
GATHERED_IN_FP8 = (GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise)
_TABLE_HEADS = ("module", "format", "layers", "why")

# Format, layers, modules and GEMMs of each exception, as a key of caches.
_Rules = tuple[tuple[GemmFormat, str, tuple[str, ...], tuple[Gemm, ...]], ...]


@dataclass(frozen=True, order=True)
class Linear:
    """One linear layer of a model; the experts of a layer are one.

    Attributes:
        depth: 0 for the main layers, else the MTP block, from 1.
        layer: from 1, of the main layers or of the block; 0 for what is in no layer of a block.
        module: its kind, "mamba.in_proj"; in an MTP block "mtp.mamba.in_proj".
    """

    depth: int
    layer: int
    module: str

    def __str__(self) -> str:
        place = str(self.layer) if self.depth == 0 else f"mtp {self.depth}.{self.layer}"
        return f"{place} {self.module}"


@dataclass(frozen=True)
class Formats:
    """The formats of the three GEMMs of a linear layer.

    Attributes:
        formats: of each GEMM.
        rules: number of the exception that decided it, from 0; None for the format of the run.
    """

    formats: dict[Gemm, GemmFormat]
    rules: dict[Gemm, int | None]

    @property
    def quantized(self) -> bool:
        """Whether any GEMM has quantized operands."""
        return any(one not in UNQUANTIZED for one in self.formats.values())


def linears(model: Model) -> list[Linear]:
    """Return every linear layer of a model that can be quantized, in order."""
    return list(_linears(shape_of(model)))


@lru_cache(maxsize=64)
def _linears(shape: Shape) -> tuple[Linear, ...]:
    found, depth = [], 0
    for layer in layers_of_shape(shape):
        if layer.depth > depth:
            depth = layer.depth
            found.append(Linear(depth, 0, MTP_PROJECTION))
        before = f"{MTP}." if depth else ""
        found += [
            Linear(depth, layer.number, before + one.linear)
            for one in layer.parameters
            if one.linear
        ]
    return tuple(found)


def formats_of(model: Model, precision: Precision) -> dict[Linear, Formats]:
    """Return the formats of every linear layer; the exceptions must be readable."""
    return dict(_known_formats(*_what_decides(model, precision)))


def quantized_kinds(model: Model, precision: Precision) -> Mapping[str, frozenset[GemmFormat]]:
    """Return the formats of each kind of linear layer that has a quantized GEMM in any layer."""
    return _known_kinds(*_what_decides(model, precision))


def quantizes(model: Model, precision: Precision) -> bool:
    """Tell whether any GEMM of a model has quantized operands."""
    return any(one.quantized for one in formats_of(model, precision).values())


def _what_decides(model: Model, precision: Precision) -> tuple[Shape, GemmFormat, _Rules]:
    """Return all that formats depend on, to know them again."""
    rules = tuple(
        (one.format, one.layers, tuple(one.modules), tuple(one.gemms))
        for one in precision.exceptions
    )
    return shape_of(model), precision.format, rules


@lru_cache(maxsize=64)
def _known_kinds(
    shape: Shape, usual: GemmFormat, rules: _Rules
) -> Mapping[str, frozenset[GemmFormat]]:
    kinds: dict[str, frozenset[GemmFormat]] = {}
    for linear, one in _known_formats(shape, usual, rules).items():
        if one.quantized:
            kinds[linear.module] = kinds.get(linear.module, frozenset()).union(one.formats.values())
    return kinds


@lru_cache(maxsize=64)
def _known_formats(shape: Shape, usual: GemmFormat, rules: _Rules) -> dict[Linear, Formats]:
    return _formats_of_all(_linears(shape), len(parse(shape.pattern).main), usual, rules)


@lru_cache(maxsize=64)  # large models take 50 ms, and the checks try many sizes
def _formats_of_all(
    found: tuple[Linear, ...], num_layers: int, usual: GemmFormat, rules: _Rules
) -> dict[Linear, Formats]:
    """Return the formats that follow from all that they depend on.

    Args:
        found: the linear layers of the model.
        num_layers: main layers of the model.
        usual: format without an exception.
        rules: the exceptions.
    """
    exceptions = [
        PrecisionRule(format=format, layers=layers, modules=list(modules), gemms=list(gemms))
        for format, layers, modules, gemms in rules
    ]
    return {one: _formats(one, usual, exceptions, num_layers) for one in found}


def _formats(
    linear: Linear, usual: GemmFormat, rules: Sequence[PrecisionRule], num_layers: int
) -> Formats:
    formats, deciding = {}, {}
    for gemm in Gemm:
        number = next(_matching(linear, gemm, rules, num_layers), None)
        formats[gemm] = usual if number is None else rules[number].format
        deciding[gemm] = number
    return Formats(formats, deciding)


def _matching(
    linear: Linear, gemm: Gemm, rules: Sequence[PrecisionRule], num_layers: int
) -> Iterator[int]:
    """Yield the numbers of the rules that match a GEMM, in order."""
    for number, rule in enumerate(rules):
        if matches(rule, linear, num_layers) and (not rule.gemms or gemm in rule.gemms):
            yield number


def matches(rule: PrecisionRule, linear: Linear, num_layers: int) -> bool:
    """Tell whether a rule speaks of a layer; only "all" reaches into MTP blocks."""
    if rule.layers.strip() != "all":
        in_range = linear.depth == 0 and linear.layer in layers_of(rule.layers, num_layers)
        if not in_range:
            return False
    return not rule.modules or any(is_named(linear.module, name) for name in rule.modules)


def is_named(module: str, name: str) -> bool:
    """Tell whether a name of a rule means a module: itself, what it is part of, or a glob.

    A module of an MTP block also has its name without "mtp.".
    """
    own = module.removeprefix(f"{MTP}.")
    return any(
        one == name or one.startswith(f"{name}.") or fnmatchcase(one, name) for one in (module, own)
    )


def fp8_primary_weights(model: Model, precision: Precision) -> dict[Linear, GemmFormat]:
    """Return the layers whose weights are kept in FP8, with `fp8_param_gather`, and the format.

    Those of MTP blocks are not: core knows a block by another name while it builds it than ever
    after (`megatron/native_recipes.py`), and would build its weights by that name.
    """
    if not precision.fp8_param_gather:
        return {}
    found = {
        linear: set(one.formats.values()) for linear, one in formats_of(model, precision).items()
    }
    return {
        linear: next(iter(formats))
        for linear, formats in found.items()
        if linear.depth == 0 and len(formats) == 1 and formats <= set(GATHERED_IN_FP8)
    }


def kept_in_words(model: Model, precision: Precision) -> str | None:
    """Say how many layers keep their weights in FP8; None for none."""
    kept = fp8_primary_weights(model, precision)
    whole = len(linears(model))
    return f"weights of {len(kept)} of {whole} linear layers, kept and gathered" if kept else None


def table_lines(formats: Mapping[Linear, Formats], rules: Sequence[PrecisionRule]) -> list[str]:
    """Return the formats as lines of a table; layers of MTP blocks count from 1 in each."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for linear, chosen in formats.items():
        key = (linear.module, formats_in_words(chosen), deciding_exceptions(chosen, rules))
        groups.setdefault(key, []).append(linear.layer)
    modules = list(dict.fromkeys(linear.module for linear in formats))
    ordered = sorted(groups.items(), key=lambda item: modules.index(item[0][0]))
    found = (
        (module, words, _layers_in_words(layers), why) for (module, words, why), layers in ordered
    )
    table = [_TABLE_HEADS, *found]
    widths = [max(len(row[column]) for row in table) for column in range(len(_TABLE_HEADS))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _layers_in_words(layers: Sequence[int]) -> str:
    """Say how many layers there are, and from which to which."""
    first, last = min(layers), max(layers)
    if last == 0:
        return "1"
    return f"{len(layers)}, {first} to {last}" if first < last else f"1, {first}"


def formats_in_words(formats: Formats) -> str:
    """Say the formats of the three GEMMs: one word where they are the same."""
    by_gemm = {gemm.value: one.value for gemm, one in formats.formats.items()}
    if len(set(by_gemm.values())) == 1:
        return next(iter(by_gemm.values()))
    return ", ".join(f"{gemm} {one}" for gemm, one in by_gemm.items())


def deciding_exceptions(formats: Formats, rules: Sequence[PrecisionRule]) -> str:
    """Name the exceptions that decided, or nothing where the format of the run holds."""
    numbers = dict.fromkeys(one for one in formats.rules.values() if one is not None)
    return "; ".join(f"exception {number}: {rules[number]}" for number in numbers)
