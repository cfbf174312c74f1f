"""The one table of names: our stored tensors <-> those of the released Hugging Face checkpoints.

Both sides hold the same rows; a row is an index of the first axis. Some of our tensors are rows of
one of theirs (the parts of in_proj), others are made of rows of several (queries, keys and values;
the experts of a layer). Our column is that of `anatomy.layers`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybrid_train.anatomy import kinds as anatomy
from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.kinds import Parameter
from hybrid_train.anatomy.layers import Layer, block_prefix, layers, main_layers, mtp_blocks
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Model

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
EMBEDDING = "backbone.embeddings.weight"
# Ours below a layer -> theirs; parts that alternate are tensors of their own on that side.
_THEIRS = {
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    **{
        same: same
        for same in (
            "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log",
            "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "mixer.out_proj.weight",
        )
    },
    "self_attention.linear_qkv.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.weight": "mixer.{part}_proj.weight",
    "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "norm.weight",
    "mlp.linear_fc1.weight": "mixer.up_proj.weight",
    "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    "pre_mlp_layernorm.weight": "norm.weight",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
    "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
    "mlp.experts.experts.linear_fc1.weight": "mixer.experts.{expert}.up_proj.weight",
    "mlp.experts.experts.linear_fc2.weight": "mixer.experts.{expert}.down_proj.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    **{
        same: same
        for same in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
    },
}  # fmt: skip


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
    root, sizes = Names("", ""), sizes_of(model)
    yield _vocabulary(anatomy.EMBEDDING, EMBEDDING, model, vocab_size)
    for layer in main_layers(model):
        yield from _layer(layer, Names(layer.prefix, f"backbone.layers.{layer.number - 1}."))
    for one in anatomy.final_norm(sizes):
        yield from _tensor(root, one, sizes)
    if not model.tie_embeddings:
        yield _vocabulary(anatomy.HEAD, HEAD, model, vocab_size)
    of_blocks = layers(model)[len(main_layers(model)) :]
    for depth in range(1, mtp_blocks(model) + 1):
        yield from _mtp_block([layer for layer in of_blocks if layer.depth == depth], sizes)


def _vocabulary(ours: Parameter, theirs: str, model: Model, vocab_size: int) -> Stored:
    rows = padded_vocab_size(vocab_size, model.vocab_multiple)
    part = Part(theirs, ours.shape(sizes_of(model, vocab_size)), 0, vocab_size, 0, vocab_size)
    return Stored(ours.stored, ours.shape(sizes_of(model, rows)), (part,))


def _layer(layer: Layer, names: Names) -> Iterator[Stored]:
    """Yield the tensors of a layer, experts last."""
    for one in sorted(layer.parameters, key=lambda one: one.of_experts):
        yield from _tensor(names, one, layer.sizes)


def _tensor(names: Names, one: Parameter, sizes: Sizes) -> Iterator[Stored]:
    theirs, shape = _THEIRS[one.stored], one.shape(sizes)
    if one.of_experts:
        yield _stacked(names, one.stored, theirs, sizes.experts, shape)
    elif one.dims[0].by:
        yield _alternating(names, one, sizes)
    elif len(one.dims[0].parts) > 1:
        start = 0
        for part, _, number in one.dims[0].runs(sizes):
            rows = slice(start, start + number)
            yield names.rows_of(f"{one.stored}.{part.name}", theirs, shape, rows)
            start += number
    else:
        yield names.rows_of(one.stored, theirs, shape, keeps_float32=one.buffer)


def _alternating(names: Names, one: Parameter, sizes: Sizes) -> Stored:
    """Cut several of their tensors into runs of ours, which alternate."""
    shape, parts, at = one.shape(sizes), [], 0
    for part, run, number in one.dims[0].runs(sizes):
        name = names.theirs + _THEIRS[one.stored].format(part=part.name)
        whole = (part.size(sizes), *shape[1:])
        parts.append(Part(name, whole, run * number, (run + 1) * number, at, number))
        at += number
    return Stored(names.ours + one.stored, shape, tuple(parts))


def _stacked(names: Names, ours: str, theirs: str, experts: int, shape: Shape) -> Stored:
    """Number the experts on a first axis of ours; each is a tensor of theirs."""
    parts = tuple(
        Part(names.theirs + theirs.format(expert=e), shape, 0, shape[0], e, 1)
        for e in range(experts)
    )
    return Stored(names.ours + ours, (experts, *shape), parts)


def _mtp_block(block: Sequence[Layer], sizes: Sizes) -> Iterator[Stored]:
    """Our blocks nest their layers; theirs are flat, what joins and ends a block on its edges."""
    depth, first = block[0].depth, (block[0].depth - 1) * len(block)
    ours, last = block_prefix(depth), first + len(block) - 1
    *opening, closing = anatomy.mtp_block(sizes)
    for one in opening:
        yield from _tensor(Names(ours, f"mtp.layers.{first}."), one, sizes)
    for inner, layer in enumerate(block):
        yield from _layer(layer, Names(layer.prefix, f"mtp.layers.{first + inner}."))
    yield from _tensor(Names(ours, f"mtp.layers.{last}."), closing, sizes)
