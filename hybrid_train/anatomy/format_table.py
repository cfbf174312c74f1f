"""The table of formats, module by module: in how many layers each is used, and why."""

from collections.abc import Mapping, Sequence

from hybrid_train.anatomy.product_formats import Formats, Linear
from hybrid_train.schema.precision import PrecisionRule

_HEADS = ("module", "format", "layers", "why")


def lines(formats: Mapping[Linear, Formats], rules: Sequence[PrecisionRule]) -> list[str]:
    """Return the table as text; layers of MTP blocks count from 1 in each."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for linear, chosen in formats.items():
        key = (linear.module, in_words(chosen), reason(chosen, rules))
        groups.setdefault(key, []).append(linear.layer)
    modules = list(dict.fromkeys(linear.module for linear in formats))
    ordered = sorted(groups.items(), key=lambda item: modules.index(item[0][0]))
    found = ((module, words, _span(layers), why) for (module, words, why), layers in ordered)
    table = [_HEADS, *found]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADS))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _span(layers: Sequence[int]) -> str:
    """Say how many layers there are, and from which to which."""
    first, last = min(layers), max(layers)
    if last == 0:
        return "1"
    return f"{len(layers)}, {first} to {last}" if first < last else f"1, {first}"


def in_words(formats: Formats) -> str:
    """Say the formats of the three products: one word where they are the same."""
    by_product = {product.value: one.value for product, one in formats.formats.items()}
    if len(set(by_product.values())) == 1:
        return next(iter(by_product.values()))
    return ", ".join(f"{product} {one}" for product, one in by_product.items())


def reason(formats: Formats, rules: Sequence[PrecisionRule]) -> str:
    """Name the exceptions that decided, or nothing where the format of the run holds."""
    numbers = dict.fromkeys(one for one in formats.rules.values() if one is not None)
    return "; ".join(f"exception {number}: {rules[number]}" for number in numbers)
