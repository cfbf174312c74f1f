"""The family nemotron-nas (DeciLM: Puzzle, Llama-3.3-Nemotron-Super-49B): blocks that differ.

`block_configs` says for each block how many query heads a key head serves and how wide its MLP is,
or that it has none of one of them (a no-op, its norm included), which in our pattern is a letter
that is left out. The class is code beside the model, which is never run: transformers has none.

Source of the width: block_config.py beside the released models, also in megatron-core 0.19.2,
transformer/heterogeneous/heterogeneous_config.py 101-125.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid_train.anatomy.layers import main_layers
from hybrid_train.hf.families.llama import Llama
from hybrid_train.hf.fields import LARGEST, Field, is_number
from hybrid_train.hf.names import Stored, table
from hybrid_train.schema.model import AttentionSizes, LayerRule, MlpSizes, Model
from hybrid_train.schema.pattern import parse

_MULTIPLE = 256  # of the width of an MLP
_HALVES = ("attention", "ffn")
_SIZE_KEYS = {"attention": "n_heads_in_group", "ffn": "ffn_mult"}


class NemotronNas(Llama):
    """Blocks of attention and MLP, some without one of them.

    Args:
        blocks: of the config that a model began with: the letters of each block; empty if it began
            with none. Blocks without letters have numbers, too, so the pattern does not tell.
    """

    model_type = "nemotron-nas"
    architecture = "DeciLMForCausalLM"
    has_class = False

    def __init__(self, blocks: tuple[str, ...] = ()) -> None:
        self.blocks = blocks

    @property
    def fields(self) -> tuple[Field, ...]:
        apart = ("num_key_value_heads", "intermediate_size")
        return tuple(one for one in super().fields if one.theirs not in apart)

    def of_config(self, config: Mapping[str, Any]) -> "NemotronNas":
        blocks = config.get("block_configs")
        if not isinstance(blocks, list) or not all(map(_is_block, blocks)):
            return self
        return NemotronNas(tuple(_letters(one) for one in blocks))

    def _fill_in(self, config: Mapping[str, Any], model: Model) -> Iterator[str]:
        model.attention.kv_heads = model.attention.heads  # until the blocks are read
        yield from super()._fill_in({}, model)
        for key in ("num_key_value_heads", "intermediate_size"):
            if config.get(key) is not None:
                yield f"{key} is {config[key]!r}; block_configs has one for each block"

    def _read_layers(self, config: Mapping[str, Any], model: Model) -> Iterator[str]:
        blocks, number = config.get("block_configs"), config.get("num_hidden_layers")
        if not isinstance(blocks, list) or not blocks or not all(map(_is_block, blocks)):
            yield "block_configs is no list of blocks, each with a table attention and a table ffn"
            return
        if number is not None and number != len(blocks):
            yield f"num_hidden_layers is {number}, and block_configs has {len(blocks)} blocks"
        faults = [fault for n, one in enumerate(blocks) for fault in _senseless(one, n, model)]
        yield from faults
        model.pattern = "".join(map(_letters, blocks))
        if faults or not model.pattern:
            yield from () if faults else ("block_configs has no block that computes",)
            return
        heads, hidden = model.attention.heads, model.hidden_size
        kept = [one for one in blocks if not one["attention"].get("no_op")]
        groups = [heads // one["attention"]["n_heads_in_group"] for one in kept]
        kept = [one for one in blocks if not one["ffn"].get("no_op")]
        widths = [_width(one["ffn"]["ffn_mult"], hidden) for one in kept]
        if groups:
            model.attention.kv_heads = _most(groups)
            model.layers += _rules(model.pattern, "*", groups)
        if widths:
            model.mlp.intermediate_size = _most(widths)
            model.layers += _rules(model.pattern, "-", widths)

    def _pattern_refusals(self, model: Model) -> Iterator[str]:
        pattern = parse(model.pattern)
        if pattern.mtp or {*pattern.main} - {*"*-"}:
            yield f"model.pattern is {model.pattern}: it has attention (*) and MLPs (-) alone"

    def refusals(self, model: Model) -> Iterator[str]:
        yield from super().refusals(model)
        for layer in main_layers(model):
            width, hidden = layer.sizes.ffn, model.hidden_size
            if layer.letter == "-" and _width(_multiple_of(width, hidden), hidden) != width:
                yield (
                    f"the MLP of layer {layer.number} is {width} wide: it has multiples of "
                    f"{_MULTIPLE}"
                )
                return

    def uneven(self, model: Model) -> Iterator[str]:
        """Yield query heads that differ; KV heads and widths may."""
        for layer in main_layers(model):
            if layer.sizes.heads != model.attention.heads and layer.letter == "*":
                yield f"model.attention.heads is {layer.sizes.heads} in layer {layer.number}"
                return

    def told(self, model: Model) -> Model:
        return copy.deepcopy(model)

    def _own_blocks(self, model: Model) -> Sequence[str]:
        """Return the letters of each block: as they were, if they make up the pattern."""
        main = parse(model.pattern).main
        if "".join(self.blocks) == main:
            return self.blocks
        return re.findall(r"\*-|\*|-", main)

    def _layer_keys(self, model: Model) -> dict[str, Any]:
        layers, blocks = iter(main_layers(model)), []
        for letters in self._own_blocks(model):
            halves: dict[str, Any] = {half: dict(_NOTHING[half]) for half in _HALVES}
            for letter in letters:
                sizes = next(layers).sizes
                half = _HALVES["*-".index(letter)]
                size = (
                    sizes.heads // sizes.kv_groups
                    if letter == "*"
                    else _multiple_of(sizes.ffn, model.hidden_size)
                )
                halves[half] |= {"no_op": False, _SIZE_KEYS[half]: size}
            blocks.append(halves)
        return {
            "block_configs": blocks,
            "num_hidden_layers": len(blocks),
            "num_key_value_heads": None,
            "intermediate_size": None,
        }

    def table(self, model: Model, vocab_size: int) -> Iterator[Stored]:
        blocks = enumerate(self._own_blocks(model))
        numbers = [number for number, letters in blocks for _ in letters]
        return table(model, vocab_size, self.spelling, numbers)


_NOTHING: Mapping[str, Mapping[str, Any]] = {
    "attention": {
        "n_heads_in_group": None,
        "no_op": True,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    },
    "ffn": {"ffn_mult": None, "no_op": True, "replace_with_linear": False, "sparsify": None},
}


def _is_block(block: Any) -> bool:
    return isinstance(block, dict) and all(isinstance(block.get(one), dict) for one in _HALVES)


def _letters(block: Mapping[str, Any]) -> str:
    return "".join(
        letter for letter, half in zip("*-", _HALVES, strict=True) if not block[half].get("no_op")
    )


def _senseless(block: Mapping[str, Any], number: int, model: Model) -> Iterator[str]:
    """Yield what of a block cannot be computed here."""
    for half in _HALVES:
        said, key = block[half], _SIZE_KEYS[half]
        if said.get("hidden_act") not in (None, "silu"):
            yield f"block_configs.{number}.{half}.hidden_act is {said['hidden_act']!r}, not 'silu'"
        for other in said.keys() - {"no_op", key, "hidden_act"}:
            if said[other]:
                yield f"block_configs.{number}.{half}.{other} is {said[other]!r}; it is not known"
        size = said.get(key)
        if said.get("no_op"):
            continue
        if half == "attention":
            if type(size) is not int or size < 1 or model.attention.heads % size:
                yield (
                    f"block_configs.{number}.attention.{key} is {size!r}; it must divide the "
                    f"number of heads, {model.attention.heads}"
                )
        elif not is_number(size) or not 0 < size <= LARGEST:
            rule = f"it must be a number above 0, up to {LARGEST}"
            yield f"block_configs.{number}.ffn.{key} is {size!r}; {rule}"


def _width(multiple: float, hidden: int) -> int:
    """Return how wide an MLP is, from its multiple of the hidden size."""
    return math.ceil(int(2 * multiple * hidden / 3) / _MULTIPLE) * _MULTIPLE


def _multiple_of(width: int, hidden: int) -> float:
    """Return the multiple of the hidden size that gives a width, if it is one of 256."""
    return 3 * width / (2 * hidden)


def _most(sizes: Sequence[int]) -> int:
    return Counter(sizes).most_common(1)[0][0]


def _rules(pattern: str, letter: str, sizes: Sequence[int]) -> list[LayerRule]:
    """Return a rule for each run of layers of one kind whose size is not the usual one."""
    numbers = [n for n, one in enumerate(pattern, start=1) if one == letter]
    usual, runs = _most(sizes), list[tuple[int, int, int]]()
    for number, size in zip(numbers, sizes, strict=True):
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], number, size)
        else:
            runs.append((number, number, size))
    return [
        LayerRule(
            layers=str(first) if first == last else f"{first}-{last}",
            attention=AttentionSizes(kv_heads=size if letter == "*" else None),
            mlp=MlpSizes(intermediate_size=size if letter == "-" else None),
        )
        for first, last, size in runs
        if size != usual
    ]


NEMOTRON_NAS = NemotronNas()
