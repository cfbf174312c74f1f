"""Scores by weights against sums written out by hand, and scores by chance."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer, main_layers
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression.choosing import choose
from hybrid_train.compression.plain_scores import random_scores, weight_scores
from hybrid_train.compression.ranking import HIDDEN, Ranking, name_of
from hybrid_train.schema.pruning import Cut
from tests.random_checkpoints import random_tensors, write_checkpoint
from tests.rankings import HEADER
from tests.tiny import tiny_job

ROWS = 64  # of the vocabulary
MODEL = tiny_job("ME*-/*E").model
MODEL.attention.head_dim, MODEL.moe.intermediate_size = 12, 40  # no other size is that of hidden
MAMBA, EXPERTS, ATTENTION, MLP = main_layers(MODEL)
Found = tuple[dict[str, Tensor], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The tensors of a checkpoint, and the scores by its weights."""
    tensors = random_tensors(MODEL, ROWS, seed=3)
    with StoredTensors(write_checkpoint(tmp_path_factory.mktemp("run"), tensors)) as stored:
        return tensors, weight_scores(MODEL, stored, ROWS)


def norms(values: Tensor) -> Tensor:
    """Norms over all dimensions but the first."""
    return values.reshape(len(values), -1).norm(dim=1)


def heads_of_mamba(layer: Layer, t: dict[str, Tensor]) -> Tensor:
    own = layer.prefix + "mixer."
    parts = (
        t[f"{own}in_proj.weight.z"], t[f"{own}in_proj.weight.x"], t[f"{own}conv1d.weight.x"],
        t[f"{own}conv1d.bias.x"], t[f"{own}norm.weight"],
        t[f"{own}out_proj.weight"].T,
    )  # fmt: skip
    flat = torch.stack([norms(one) for one in parts]).sum(dim=0)
    return flat.view(layer.sizes.ssm_heads, layer.sizes.ssm_head_dim)


def heads_of_attention(layer: Layer, t: dict[str, Tensor]) -> Tensor:
    sizes, own = layer.sizes, layer.prefix + "self_attention."
    groups = t[f"{own}linear_qkv.weight"].view(sizes.kv_groups, -1, sizes.head_dim, sizes.hidden)
    queries = groups[:, :-2].reshape(sizes.heads, -1)  # each group has its key and value behind
    outputs = t[f"{own}linear_proj.weight"].T.reshape(sizes.heads, -1)
    return norms(queries) + norms(outputs)


def experts(layer: Layer, t: dict[str, Tensor]) -> Tensor:
    own = layer.prefix + "mlp."
    return norms(t[f"{own}router.weight"]) + sum(
        norms(t[f"{own}experts.experts.linear_fc{number}.weight"]) for number in (1, 2)
    )


def expert_neurons(layer: Layer, t: dict[str, Tensor]) -> Tensor:
    own = layer.prefix + "mlp.experts.experts."
    first, second = (t[f"{own}linear_fc{number}.weight"] for number in (1, 2))
    return first.norm(dim=2) + second.norm(dim=1)


def neurons(layer: Layer, t: dict[str, Tensor]) -> Tensor:
    own = layer.prefix + "mlp."
    return norms(t[f"{own}linear_fc1.weight"]) + norms(t[f"{own}linear_fc2.weight"].T)


@pytest.mark.parametrize(
    ("layer", "axis", "reference"),
    [
        (MAMBA, Axis.ssm_heads, heads_of_mamba),
        (ATTENTION, Axis.heads, heads_of_attention),
        (EXPERTS, Axis.experts, experts),
        (EXPERTS, Axis.expert_ffn, expert_neurons),
        (MLP, Axis.ffn, neurons),
    ],
    ids=lambda one: one.name if isinstance(one, Axis) else "",
)  # fmt: skip
def test_the_weights_of_an_element_are_those_of_all_tensors_that_have_it(
    found: Found, layer: Layer, axis: Axis, reference: object
) -> None:
    tensors, scores = found
    assert callable(reference)
    expected = reference(layer, tensors).numpy()
    np.testing.assert_allclose(scores[name_of(layer, axis)], expected, rtol=1e-5)


def test_a_hidden_channel_has_weights_in_every_layer_and_outside_of_them(found: Found) -> None:
    tensors, scores = found
    size, expected = MODEL.hidden_size, torch.zeros(MODEL.hidden_size)
    for values in tensors.values():
        for place, length in enumerate(values.shape):
            if length == size:
                expected += norms(values.transpose(0, place))
    joining = tensors["mtp.layers.0.eh_proj.weight"]  # its second dimension has each twice
    expected += joining.view(size, 2, size).permute(2, 0, 1).flatten(1).norm(dim=1)
    np.testing.assert_allclose(scores[HIDDEN], expected.numpy(), rtol=1e-5)


def test_chance_follows_from_the_seed_and_chooses_a_child() -> None:
    first, again, other = (random_scores(MODEL, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    children = [choose(MODEL, Ranking(HEADER, one), Cut(share=0.7), ROWS) for one in (first, other)]
    assert children[0].model == children[1].model
    kept = [one.selection.hidden for one in children]
    assert all(one is not None for one in kept)
    assert not np.array_equal(kept[0], kept[1])
