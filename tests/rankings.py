"""Rankings for tests: a score for every element of a model, at random or all the same."""

from collections.abc import Mapping

import numpy as np

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.kinds import CHOSEN
from hybrid_train.anatomy.layers import Layer, layers, main_layers
from hybrid_train.compression.ranking import BLOCKS, HIDDEN, LAYERS, Header, Ranking, name_of
from hybrid_train.schema.model import Model

HEADER = Header(
    run="runs/parent", step=7, checksum="c0ffee", rows=4, sequence_length=16, over_tokens="mean",
    over_rows="l2",
)  # fmt: skip
METRIC = "cosine"  # of its layers and blocks
_FROM_OTHERS = (Axis.ssm_head_dim, Axis.kv_groups)  # no scores of their own


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of all scores of a model, by name."""
    number = len(main_layers(model))
    found: dict[str, tuple[int, ...]] = {HIDDEN: (model.hidden_size,)}
    for layer in layers(model):
        axes = [axis for axis in CHOSEN[layer.letter] if axis not in _FROM_OTHERS]
        found |= {name_of(layer, axis): _shape(layer, axis) for axis in axes}
    return {**found, LAYERS + METRIC: (number,), BLOCKS + METRIC: (number, number)}


def _shape(layer: Layer, axis: Axis) -> tuple[int, ...]:
    sizes = layer.sizes
    if axis is Axis.ssm_heads:
        return sizes.ssm_heads, sizes.ssm_head_dim
    if axis is Axis.expert_ffn:
        return sizes.experts, sizes.expert_ffn
    return (sizes.along(axis),)


def random_ranking(model: Model, seed: int = 0) -> Ranking:
    """Scores between 0 and 1."""
    random = np.random.default_rng(seed)
    drawn = {name: random.random(shape) for name, shape in shapes(model).items()}
    return Ranking(HEADER, {name: one.astype(np.float32) for name, one in drawn.items()})


def equal_ranking(model: Model) -> Ranking:
    """The same score for all."""
    return Ranking(
        HEADER, {name: np.ones(shape, np.float32) for name, shape in shapes(model).items()}
    )


def with_scores(ranking: Ranking, changed: Mapping[str, object]) -> Ranking:
    """The ranking with other scores of some names."""
    new = {name: np.asarray(one, np.float32) for name, one in changed.items()}
    return Ranking(ranking.header, {**ranking.scores, **new})
