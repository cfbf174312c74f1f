"""Tables of names: our stored tensors <-> those of the released checkpoints of a family.

Both sides hold the same rows; a row is an index of the first axis. Some of our tensors are rows of
one of theirs (the parts of in_proj), others are made of rows of several (queries, keys and values;
gates and neurons; the experts of a layer). Our column is that of `anatomy.layers`; theirs is a
`Spelling`, one for each family (`hf/families/`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid_train.anatomy import kinds as anatomy
from hybrid_train.anatomy.axes import Sizes, sizes_of
from hybrid_train.anatomy.kinds import Parameter
from hybrid_train.anatomy.layers import Layer, block_prefix, layers, main_layers, mtp_blocks
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.model import Model

Shape = tuple[int, ...]
HEAD = "lm_head.weight"


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
class Spelling:
    """What a family calls its tensors.

    Attributes:
        embedding: the whole name of the embedding.
        layers: what stands before the number of a layer, or of a block of two.
        tensors: ours below a layer -> theirs; parts that alternate, and the gates and neurons of an
            MLP, are tensors of their own on that side if the name has a `{part}`, else the rows of
            one tensor, one part behind the other.
        final_norm: what stands before the last part of the names of the last norm.
        head: the whole name of the head.
    """

    embedding: str
    layers: str
    tensors: Mapping[str, str]
    final_norm: str
    head: str = HEAD


@dataclass(frozen=True)
class Names:
    """A prefix on either side: of the model, a layer, or a layer inside MTP."""

    ours: str
    theirs: str
    spelling: Spelling

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


def table(
    model: Model, vocab_size: int, spelling: Spelling, numbers: Sequence[int]
) -> Iterator[Stored]:
    """Yield every tensor of a model, with the names of the released layout.

    Args:
        model: the model.
        vocab_size: rows of their embedding and head; ours are padded.
        spelling: of the family.
        numbers: of each main layer on their side, or of the block that it is half of.
    """
    sizes, main = sizes_of(model), main_layers(model)
    yield _vocabulary(anatomy.EMBEDDING, spelling.embedding, model, vocab_size)
    for layer, number in zip(main, numbers, strict=True):
        yield from _layer(layer, Names(layer.prefix, f"{spelling.layers}{number}.", spelling))
    for one in anatomy.final_norm(sizes):
        theirs = f"{spelling.final_norm}.{one.stored.rpartition('.')[2]}"
        yield Names("", "", spelling).rows_of(one.stored, theirs, one.shape(sizes))
    if not model.tie_embeddings:
        yield _vocabulary(anatomy.HEAD, spelling.head, model, vocab_size)
    of_blocks = layers(model)[len(main) :]
    for depth in range(1, mtp_blocks(model) + 1):
        block = [layer for layer in of_blocks if layer.depth == depth]
        yield from _mtp_block(block, sizes, spelling)


def _vocabulary(ours: Parameter, theirs: str, model: Model, vocab_size: int) -> Stored:
    rows = padded_vocab_size(vocab_size, model.vocab_multiple)
    part = Part(theirs, ours.shape(sizes_of(model, vocab_size)), 0, vocab_size, 0, vocab_size)
    return Stored(ours.stored, ours.shape(sizes_of(model, rows)), (part,))


def _layer(layer: Layer, names: Names) -> Iterator[Stored]:
    """Yield the tensors of a layer, experts last."""
    for one in sorted(layer.parameters, key=lambda one: one.of_experts):
        yield from _tensor(names, one, layer.sizes)


def _tensor(names: Names, one: Parameter, sizes: Sizes) -> Iterator[Stored]:
    theirs, shape = names.spelling.tensors[one.stored], one.shape(sizes)
    if one.of_experts:
        yield _stacked(names, one.stored, theirs, sizes.experts, shape)
    elif one.dims[0].apart:
        start = 0
        for part, _, number in one.dims[0].runs(sizes):
            rows = slice(start, start + number)
            yield names.rows_of(f"{one.stored}.{part.name}", theirs, shape, rows)
            start += number
    elif len(one.dims[0].parts) > 1:
        yield _joined(names, one, sizes)
    else:
        yield names.rows_of(one.stored, theirs, shape, keeps_float32=one.buffer)


def _joined(names: Names, one: Parameter, sizes: Sizes) -> Stored:
    """Cut the parts of a tensor, on their side one behind the other, into the runs of ours."""
    shape, parts, at = one.shape(sizes), [], 0
    theirs = names.spelling.tensors[one.stored]
    before, first = {}, 0  # the first row of each part in a tensor that holds all of them
    for part in one.dims[0].parts:
        before[part.name] = first
        first += part.size(sizes)
    for part, run, number in one.dims[0].runs(sizes):
        rows, start = part.size(sizes), run * number
        if "{part}" not in theirs:
            rows, start = shape[0], start + before[part.name]
        name = names.theirs + theirs.format(part=part.name)
        parts.append(Part(name, (rows, *shape[1:]), start, start + number, at, number))
        at += number
    return Stored(names.ours + one.stored, shape, tuple(parts))


def _stacked(names: Names, ours: str, theirs: str, experts: int, shape: Shape) -> Stored:
    """Number the experts on a first axis of ours; each is a tensor of theirs."""
    parts = tuple(
        Part(names.theirs + theirs.format(expert=e), shape, 0, shape[0], e, 1)
        for e in range(experts)
    )
    return Stored(names.ours + ours, (experts, *shape), parts)


def _mtp_block(block: Sequence[Layer], sizes: Sizes, spelling: Spelling) -> Iterator[Stored]:
    """Our blocks nest their layers; theirs are flat, what joins and ends a block on its edges."""
    depth, first = block[0].depth, (block[0].depth - 1) * len(block)
    ours, last = block_prefix(depth), first + len(block) - 1
    *opening, closing = anatomy.mtp_block(sizes)
    for one in opening:
        yield from _tensor(Names(ours, f"mtp.layers.{first}.", spelling), one, sizes)
    for inner, layer in enumerate(block):
        names = Names(layer.prefix, f"mtp.layers.{first + inner}.", spelling)
        yield from _layer(layer, names)
    yield from _tensor(Names(ours, f"mtp.layers.{last}.", spelling), closing, sizes)
