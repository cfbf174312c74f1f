"""The one table of names: our stored tensors <-> those of the released Hugging Face checkpoints.

Both sides hold the same rows; a row is an index of the first axis. Some of our tensors are rows of
one of theirs (the parts of in_proj), others are made of rows of several (queries, keys and values;
the experts of a layer). Sizes: h hidden; D = Mamba heads x head width; G groups; N state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid_train.anatomy.counts import CONV_WIDTH
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Attention, Mamba, Model, Moe
from hybrid_train.schema.pattern import parse

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
EMBEDDING = "backbone.embeddings.weight"


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of one of their tensors that are rows of one of ours, from `at` on."""

    name: str
    shape: Shape  # of their whole tensor
    start: int
    stop: int
    at: int
    rows: int  # of ours: one for an expert, which is all rows of a tensor of theirs


@dataclass(frozen=True)
class Stored:
    """One of our tensors in a checkpoint, and what it is made of."""

    key: str
    shape: Shape
    parts: tuple[Part, ...]
    keeps_float32: bool = False  # whatever format the others have


@dataclass(frozen=True)
class Names:
    """A prefix on either side: of the model, a layer, or a layer inside MTP."""

    ours: str
    theirs: str

    def same(self, ours: str, theirs: str, *shape: int, keeps_float32: bool = False) -> Stored:
        """Name a tensor that is the same on both sides."""
        return self.rows_of(ours, theirs, shape, keeps_float32=keeps_float32)

    def rows_of(
        self, ours: str, theirs: str, shape: Shape, rows: slice | None = None,
        *, keeps_float32: bool = False,
    ) -> Stored:  # fmt: skip
        """Name a tensor that is some rows of one of theirs."""
        start, stop = (rows.start, rows.stop) if rows else (0, shape[0])
        part = Part(self.theirs + theirs, shape, start, stop, 0, stop - start)
        return Stored(
            self.ours + ours, (stop - start, *shape[1:]), (part,), keeps_float32=keeps_float32
        )


def table(model: Model, vocab_size: int) -> Iterator[Stored]:
    """Yield every tensor of a model, with the names of the released layout (`backbone.`).

    Args:
        model: the model.
        vocab_size: rows of their embedding and head; ours are padded.
    """
    root, rows = Names("", ""), padded_vocab_size(vocab_size, model.vocab_multiple)
    yield _vocabulary(root, "embedding.word_embeddings.weight", EMBEDDING, model, vocab_size, rows)
    pattern = parse(model.pattern)
    for number, letter in enumerate(pattern.main):
        names = Names(f"decoder.layers.{number}.", f"backbone.layers.{number}.")
        yield from _layer(letter, names, model)
    yield root.same("decoder.final_norm.weight", "backbone.norm_f.weight", model.hidden_size)
    if not model.tie_embeddings:
        yield _vocabulary(root, "output_layer.weight", HEAD, model, vocab_size, rows)
    if pattern.mtp:
        for block in range(mtp_blocks(model)):
            yield from _mtp_block(block, pattern.mtp, model)


def mtp_blocks(model: Model) -> int:
    """Return how many MTP blocks have weights of their own."""
    depths = parse(model.pattern).mtp_depths
    return min(depths, 1) if model.mtp.repeated_block else depths


def _vocabulary(
    names: Names, ours: str, theirs: str, model: Model, vocab_size: int, rows: int
) -> Stored:
    part = Part(theirs, (vocab_size, model.hidden_size), 0, vocab_size, 0, vocab_size)
    return Stored(names.ours + ours, (rows, model.hidden_size), (part,))


def _layer(letter: str, names: Names, model: Model) -> Iterator[Stored]:
    hidden = model.hidden_size
    if letter == "M":
        yield from _mamba(names, model.mamba, hidden)
    elif letter == "*":
        yield from _attention(names, model.attention, hidden)
    elif letter == "-":
        width = model.mlp.intermediate_size
        yield names.same("mlp.linear_fc1.layer_norm_weight", "norm.weight", hidden)
        yield names.same("mlp.linear_fc1.weight", "mixer.up_proj.weight", width, hidden)
        yield names.same("mlp.linear_fc2.weight", "mixer.down_proj.weight", hidden, width)
    else:
        yield from _experts(names, model.moe, hidden)


def _mamba(names: Names, sizes: Mamba, hidden: int) -> Iterator[Stored]:
    inner, state = sizes.heads * sizes.head_dim, sizes.groups * sizes.state_size
    packed = {"z": inner, "x": inner, "B": state, "C": state, "dt": sizes.heads}
    channels = {part: packed[part] for part in ("x", "B", "C")}
    yield names.same("mixer.in_proj.layer_norm_weight", "norm.weight", hidden)
    yield from _packed(names, "mixer.in_proj.weight", packed, (hidden,))
    yield from _packed(names, "mixer.conv1d.weight", channels, (1, CONV_WIDTH))
    yield from _packed(names, "mixer.conv1d.bias", channels, ())
    for name in ("A_log", "D", "dt_bias"):
        yield names.same(f"mixer.{name}", f"mixer.{name}", sizes.heads)
    yield names.same("mixer.norm.weight", "mixer.norm.weight", inner)
    yield names.same("mixer.out_proj.weight", "mixer.out_proj.weight", hidden, inner)


def _packed(names: Names, name: str, rows: dict[str, int], rest: Shape) -> Iterator[Stored]:
    """Cut one of their tensors into ours, which are named by part."""
    total, start = sum(rows.values()), 0
    for part, number in rows.items():
        yield names.rows_of(f"{name}.{part}", name, (total, *rest), slice(start, start + number))
        start += number


def _attention(names: Names, sizes: Attention, hidden: int) -> Iterator[Stored]:
    """Each key-value group of ours holds its queries, then its key, then its value."""
    width = sizes.head_dim
    queries = sizes.heads // sizes.kv_heads * width  # rows of one group
    rows = {"q": queries, "k": width, "v": width}
    parts, at = [], 0
    for group in range(sizes.kv_heads):
        for letter, number in rows.items():
            shape = (number * sizes.kv_heads, hidden)
            name = f"{names.theirs}mixer.{letter}_proj.weight"
            start = group * number
            parts.append(Part(name, shape, start, start + number, at, number))
            at += number
    yield names.same("self_attention.linear_qkv.layer_norm_weight", "norm.weight", hidden)
    key = f"{names.ours}self_attention.linear_qkv.weight"
    yield Stored(key, (at, hidden), tuple(parts))
    heads = sizes.heads * width
    yield names.same("self_attention.linear_proj.weight", "mixer.o_proj.weight", hidden, heads)


def _experts(names: Names, sizes: Moe, hidden: int) -> Iterator[Stored]:
    outer, inner = sizes.latent_size or hidden, sizes.intermediate_size
    yield names.same("pre_mlp_layernorm.weight", "norm.weight", hidden)
    yield names.same("mlp.router.weight", "mixer.gate.weight", sizes.experts, hidden)
    bias = "mixer.gate.e_score_correction_bias"
    yield names.same("mlp.router.expert_bias", bias, sizes.experts, keeps_float32=True)
    if sizes.latent_size is not None:
        for number, shape in ((1, (outer, hidden)), (2, (hidden, outer))):
            name = f"fc{number}_latent_proj.weight"
            yield names.same(f"mlp.{name}", f"mixer.{name}", *shape)
    if sizes.shared_intermediate_size is not None:
        width = sizes.shared_intermediate_size
        ours, theirs = "mlp.shared_experts.linear_fc", "mixer.shared_experts"
        yield names.same(f"{ours}1.weight", f"{theirs}.up_proj.weight", width, hidden)
        yield names.same(f"{ours}2.weight", f"{theirs}.down_proj.weight", hidden, width)
    yield _stacked(names, 1, "up_proj", sizes.experts, (inner, outer))
    yield _stacked(names, 2, "down_proj", sizes.experts, (outer, inner))


def _stacked(names: Names, number: int, theirs: str, experts: int, shape: Shape) -> Stored:
    """Number the experts on a first axis of ours; each is a tensor of theirs."""
    parts = tuple(
        Part(f"{names.theirs}mixer.experts.{e}.{theirs}.weight", shape, 0, shape[0], e, 1)
        for e in range(experts)
    )
    key = f"{names.ours}mlp.experts.experts.linear_fc{number}.weight"
    return Stored(key, (experts, *shape), parts)


def _mtp_block(block: int, letters: str, model: Model) -> Iterator[Stored]:
    """Our blocks nest their layers; theirs are flat, what joins and ends a block on its edges."""
    hidden, first = model.hidden_size, block * len(letters)
    ours, last = f"mtp.layers.{block}.", first + len(letters) - 1
    opening, closing = Names(ours, f"mtp.layers.{first}."), Names(ours, f"mtp.layers.{last}.")
    yield opening.same("enorm.weight", "enorm.weight", hidden)
    yield opening.same("hnorm.weight", "hnorm.weight", hidden)
    yield opening.same("eh_proj.weight", "eh_proj.weight", hidden, 2 * hidden)
    for inner, letter in enumerate(letters):
        names = Names(f"{ours}mtp_model_layer.layers.{inner}.", f"mtp.layers.{first + inner}.")
        yield from _layer(letter, names, model)
    yield closing.same("final_layernorm.weight", "final_layernorm.weight", hidden)
