"""Keys of rotary embeddings in a config.json, both spellings of them, read and written.

Up to transformers 4 they stand at the top: rope_theta, rope_scaling {rope_type or type, ...},
partial_rotary_factor; transformers 5 has all of them in rope_parameters. Whatever stands twice must
say the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid_train.hf.fields import LARGEST, is_number
from hybrid_train.schema.model import Rope, RopeScaling

FRACTIONS = ("partial_rotary_factor", "rope_percent", "rope_percentage")
ORIGINAL = "original_max_position_embeddings"
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", *FRACTIONS, ORIGINAL)
LONGROPE_KEYS = ("short_factor", "long_factor")
_INTERLEAVED = ("rotary_interleaved", "rope_interleaved", "rope_interleave")
_OLDER = {"su": "longrope", "default": "none"}
_LLAMA3 = {  # their keys -> our fields
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
}
_OF_TYPE = {
    "none": (),
    "llama3": (*_LLAMA3, ORIGINAL),
    "longrope": (*LONGROPE_KEYS, ORIGINAL, "factor", "attention_factor"),
}
_TOLERANCE = 1e-6  # of factors that are written with some digits


class RopeReader:
    """What a config says of rotary embeddings, wherever it stands.

    Args:
        config: the config.
        defaults: of the class, by key, where a config leaves one out.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = defaults
        self.faults: list[str] = []
        self._found: dict[str, tuple[str, Any]] = {}  # where it stands, and what is said
        for key in ("rope_parameters", "rope_scaling"):
            inner = config.get(key)
            if isinstance(inner, dict):
                for name, value in inner.items():
                    self._note("rope_type" if name == "type" else name, f"{key}.{name}", value)
            elif inner is not None:
                self.faults.append(f"{key} is {inner!r}; it must be a table or null")
        for name in ("rope_theta", ORIGINAL):
            self._note(name, name, config.get(name))
        for name in FRACTIONS:
            self._note(FRACTIONS[0], name, config.get(name))
        for name in _INTERLEAVED:
            if config.get(name):
                self.faults.append(f"{name} is {config[name]!r}; channels are turned as two halves")

    def _note(self, name: str, where: str, value: Any) -> None:
        if name == "rope_type" and isinstance(value, str):
            value = _OLDER.get(value, value)
        if value is None:
            return
        before = self._found.setdefault(name, (where, value))
        if before[1] != value:
            self.faults.append(f"{where} is {value!r}, and {before[0]} {before[1]!r}")

    def _get(self, name: str) -> Any:
        return self._found.get(name, ("", self._defaults.get(name)))[1]

    def _number(self, name: str, least: float = 0.0) -> float:
        value = self._get(name)
        if is_number(value) and least <= value < math.inf and value > 0:
            return float(value)
        where = self._found.get(name, (name, None))[0]
        above = f"of at least {least:g}" if least else "above 0"
        self.faults.append(f"{where} is {value!r}; it must be a number {above}")
        return 1.0

    def read(self, head_dim: int, length: int) -> Rope:
        """Return the section; what is wrong is in `faults`, in words.

        Args:
            head_dim: channels of a head.
            length: positions that the config says it knows.
        """
        rope = Rope(theta=self._number("rope_theta", 1), fraction=self._number(FRACTIONS[0]))
        kind = self._get("rope_type") or "none"
        if not isinstance(kind, str) or kind not in _OF_TYPE:
            known = ", ".join(("default", *(name for name in _OF_TYPE if name != "none"), "su"))
            where = self._found["rope_type"][0]
            self.faults.append(f"{where} is {kind!r}; only {known} are known here")
            return rope
        rope.scaling = RopeScaling[kind]
        top = {name for name, (where, _) in self._found.items() if where == name}
        of_type = {"rope_type", "rope_theta", *FRACTIONS, *_OF_TYPE[kind], *top}
        for name in sorted(self._found.keys() - of_type):
            where, value = self._found[name]
            self.faults.append(f"{where} is {value!r}, which means nothing to rope_type {kind}")
        if kind == "llama3":
            self._read_llama3(rope, length)
        elif kind == "longrope":
            self._read_longrope(rope, length)
        turned = rope.turned(head_dim)
        if turned % 2 or not 0 < turned <= head_dim:
            self.faults.append(
                f"{turned} of {head_dim} channels of a head are turned; it must be an even number"
            )
        elif kind == "longrope":
            self._require_factors(rope, turned // 2)
        return rope

    def _read_llama3(self, rope: Rope, length: int) -> None:
        for theirs, ours in _LLAMA3.items():
            setattr(rope, ours, self._number(theirs))
        rope.original_length = self._whole(ORIGINAL, length)

    def _read_longrope(self, rope: Rope, length: int) -> None:
        rope.original_length = self._whole(ORIGINAL, length)
        rope.short_factors = self._list("short_factor")
        rope.long_factors = self._list("long_factor")
        rope.maximum_length = length
        if self._get("factor") is not None:
            longest = min(self._number("factor") * rope.original_length, 2.0 * LARGEST)
            rope.maximum_length = round(longest)
            if abs(longest - rope.maximum_length) > _TOLERANCE * longest:
                self.faults.append(
                    f"factor is {self._get('factor')!r}: times {ORIGINAL}, "
                    f"{rope.original_length}, it must be a whole number"
                )
        said, meant = self._get("attention_factor"), rope.magnitude
        if said is not None and abs(self._number("attention_factor") - meant) > _TOLERANCE:
            self.faults.append(
                f"attention_factor is {said!r}; of {rope.maximum_length} positions that were "
                f"{rope.original_length} it is {meant:.7g} here"
            )

    def _whole(self, name: str, otherwise: int) -> int:
        value = self._get(name)
        if value is None:
            return otherwise
        if type(value) is int and 0 < value <= LARGEST:
            return value
        self.faults.append(f"{name} is {value!r}; it must be a whole number up to {LARGEST}")
        return otherwise

    def _list(self, name: str) -> list[float]:
        value = self._get(name)
        if isinstance(value, list) and all(is_number(one) and 0 < one < math.inf for one in value):
            return [float(one) for one in value]
        self.faults.append(f"{name} is {value!r}; it must be a list of numbers above 0")
        return []

    def _require_factors(self, rope: Rope, pairs: int) -> None:
        for name, factors in zip(
            LONGROPE_KEYS, (rope.short_factors, rope.long_factors), strict=True
        ):
            if factors and len(factors) != pairs:
                self.faults.append(
                    f"{name} has {len(factors)} numbers; {pairs} pairs of channels are turned"
                )


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without "su", which transformers 5.23 does not read as longrope in time."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return dict(config)
    kinds = {key: "longrope" for key in ("type", "rope_type") if scaling.get(key) == "su"}
    return {**config, "rope_scaling": scaling | kinds}


def written(rope: Rope, *, partial: bool, short: bool) -> dict[str, Any]:
    """Return the keys of a section in both spellings.

    Args:
        rope: the section.
        partial: whether the family has a key for the share that is turned.
        short: whether rope_scaling may hold the kind and the two lists only (phi3 of
            transformers 4 refuses more).
    """
    assert rope.theta is not None
    kind = "default" if rope.scaling is RopeScaling.none else rope.scaling.value
    share = {FRACTIONS[0]: rope.fraction} if partial else {}
    sizes = dict(_sizes(rope))
    scaling: dict[str, Any] | None = {"rope_type": kind, **sizes} if sizes else None
    if rope.scaling is RopeScaling.longrope and short:
        scaling = {"type": kind, **{key: sizes[key] for key in LONGROPE_KEYS}}
    config = {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **share, **sizes},
        **share,
    }
    if rope.scaling is RopeScaling.longrope:
        config[ORIGINAL] = rope.original_length
    return config


def _sizes(rope: Rope) -> Iterator[tuple[str, float | Sequence[float]]]:
    if rope.scaling is RopeScaling.none:
        return
    yield ORIGINAL, rope.original_length
    if rope.scaling is RopeScaling.llama3:
        for theirs, ours in _LLAMA3.items():
            yield theirs, getattr(rope, ours)
        return
    yield "factor", rope.maximum_length / rope.original_length
    yield from zip(LONGROPE_KEYS, (list(rope.short_factors), list(rope.long_factors)), strict=True)
