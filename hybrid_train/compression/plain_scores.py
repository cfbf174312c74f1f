"""Scores that read no text, which others are held against: what weights weigh, or chance.

    weights     L2 norm of the weights of an element, summed over the tensors that have it
    random      between 0 and 1, by the seed

A tensor has the elements of a Mamba layer that have both, a head and a channel of it; a layer has
all of its tensors. Buffers are no weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, Dim, Part, Sizes, dim, sizes_of
from hybrid_train.anatomy.kinds import CHOSEN, Parameter
from hybrid_train.anatomy.layers import Layer, layers, main_layers, stored_tensors
from hybrid_train.anatomy.selection import Indices
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression.ranking import HIDDEN, LAYERS, Scores, name_of
from hybrid_train.schema.importance import ScoreSource
from hybrid_train.schema.model import Model

_Norms = npt.NDArray[np.float64]
_PAIRS = {
    Axis.ssm_heads: (Axis.ssm_heads, Axis.ssm_head_dim),
    Axis.expert_ffn: (Axis.experts, Axis.expert_ffn),
}


def _axes(layer: Layer) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    """Yield the names of the scores of a layer, and the axes that they lie along."""
    for axis in CHOSEN[layer.letter]:
        if axis is not Axis.ssm_head_dim and layer.sizes.along(axis):
            yield name_of(layer, axis), _PAIRS.get(axis, (axis,))


def random_scores(model: Model, seed: int) -> dict[str, Scores]:
    """Draw the scores of every element of a model."""
    chance = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        HIDDEN: (model.hidden_size,),
        LAYERS + ScoreSource.random.value: (len(main_layers(model)),),
    }
    for layer in layers(model):
        shapes |= {name: tuple(map(layer.sizes.along, axes)) for name, axes in _axes(layer)}
    return {name: chance.random(shape, dtype=np.float32) for name, shape in shapes.items()}


def weight_scores(model: Model, stored: StoredTensors, vocab_rows: int) -> dict[str, Scores]:
    """Score every element of a model by its weights.

    Args:
        model: the model.
        stored: its checkpoint.
        vocab_rows: of embedding and head, as they are stored.
    """
    hidden = np.zeros(model.hidden_size)
    by_layer = {layer.prefix: layer for layer in layers(model)}
    numbers = {layer.prefix: layer.number - 1 for layer in main_layers(model)}
    found = {name: np.zeros(tuple(map(layer.sizes.along, axes)))
             for layer in by_layer.values() for name, axes in _axes(layer)}  # fmt: skip
    of_layers = np.zeros(len(numbers))
    for key, shape, one in stored_tensors(model, vocab_rows):
        if one.buffer:
            continue
        squares = stored.read(key, 0, shape[0]).double().square()
        layer = next((by_layer[prefix] for prefix in by_layer if key.startswith(prefix)), None)
        sizes = layer.sizes if layer else sizes_of(model, vocab_rows)
        dims = _dims(one, key)
        hidden += _norms(squares, dims, sizes, (Axis.hidden,))
        if layer is None:
            continue
        for name, axes in _axes(layer):
            found[name] += _norms(squares, dims, sizes, axes).reshape(found[name].shape)
        if layer.prefix in numbers:
            of_layers[numbers[layer.prefix]] += float(squares.sum().sqrt())
    found |= {HIDDEN: hidden, LAYERS + ScoreSource.weights.value: of_layers}
    return {name: one.astype(np.float32) for name, one in found.items()}


def _dims(one: Parameter, key: str) -> tuple[Dim, ...]:
    """Return the dimensions of a tensor as it is stored: of all experts, or of one part."""
    if one.of_experts:
        return dim(Axis.experts), *one.dims
    parts = [part for part in one.dims[0].parts if key.endswith(f"{one.stored}.{part.name}")]
    return (Dim(tuple(parts)), *one.dims[1:]) if parts else one.dims


def _norms(squares: Tensor, dims: Sequence[Dim], sizes: Sizes, axes: tuple[Axis, ...]) -> _Norms:
    """Return the norm of each element in a tensor, flat; 0 where it has none of them.

    Where two dimensions lie along one axis, each has the elements.

    Args:
        squares: of the values.
        dims: of the tensor.
        sizes: of its layer.
        axes: of which an element is one place along each.
    """
    total = np.zeros(int(np.prod([sizes.along(axis) for axis in axes])))
    if axes[0] is Axis.experts and len(axes) > 1:
        if dims[0] != dim(Axis.experts):
            return total
        inner = [_norms(of_one, dims[1:], sizes, axes[1:]) for of_one in squares]
        return np.concatenate(inner)
    for number, one in enumerate(dims):
        places = np.concatenate([_elements(part, one, sizes, axes) for part in one.parts], axis=1)
        flat = places.ravel()
        others = [other for other in range(len(dims)) if other != number]
        sums = squares.sum(dim=others).numpy() if others else squares.numpy()
        here = flat >= 0
        if here.any():
            total += np.sqrt(np.bincount(flat[here], sums[here], minlength=len(total)))
    return total


def _elements(part: Part, one: Dim, sizes: Sizes, axes: tuple[Axis, ...]) -> Indices:
    """Return of which element each row of a part is, by runs; -1 where it is of none."""
    runs = sizes.along(one.by) if one.by else 1
    shape = (part.times, *map(sizes.along, part.axes))
    if not set(axes) <= set(part.axes):
        return np.full((runs, part.size(sizes) // runs), -1)
    grid = np.indices(shape)
    where = [grid[1 + part.axes.index(axis)] for axis in axes]
    return np.ravel_multi_index(where, [sizes.along(axis) for axis in axes]).reshape(runs, -1)
