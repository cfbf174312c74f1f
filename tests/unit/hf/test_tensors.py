"""Tensors that are filled up to the width of the widest layer, and what that changes: nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.layers import stored_tensors
from hybrid_train.hf.padding import one_width
from hybrid_train.hf.tensors import NEVER_CHOSEN, Padded
from hybrid_train.schema.model import Activation, LayerRule, MlpSizes, Model, MoeSizes
from tests.tiny import VOCAB, tiny_job

FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
ROWS = 64  # of the vocabulary, with its padding


class Held:
    """The tensors of a model, each with numbers of its own."""

    def __init__(self, model: Model) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = {
            one.key: torch.rand(one.shape, generator=generator) + 1
            for one in stored_tensors(model, ROWS)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def where(self, name: str) -> str:
        return name

    def read(self, name: str, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= len(self.values[name])
        return self.values[name][start:stop]


def model(*rules: LayerRule, gated: bool = False) -> Model:
    found = tiny_job("M-E*-E").model
    found.layers = list(rules)
    found.mlp.gated = gated
    if gated:
        found.mlp.activation = Activation.silu
    return found


NARROW_MLP = LayerRule(layers="2", mlp=MlpSizes(intermediate_size=24))
NARROW_EXPERTS = LayerRule(layers="3", moe=MoeSizes(experts=3, intermediate_size=8))


def read_whole(side: Any, name: str) -> Tensor:
    """Read a tensor in ranges of every width, which must agree."""
    rows = side.shape(name)[0]
    whole: Tensor = side.read(name, 0, rows)
    for width in (1, 3, 7, rows - 1):
        starts = range(0, rows, width)
        parts = [side.read(name, start, min(start + width, rows)) for start in starts]
        assert torch.equal(torch.cat(parts), whole)
    return whole


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_zeros_stand_behind_neurons_and_gates_whatever_rows_are_read(gated: bool) -> None:
    narrow = model(NARROW_MLP, gated=gated)
    held = Held(narrow)
    wide = Padded(held, one_width(narrow), VOCAB)
    fc1 = read_whole(wide, f"decoder.layers.1.{FC1}")
    fc2 = read_whole(wide, f"decoder.layers.1.{FC2}")
    for part, own in zip(
        fc1.split(64), held.values[f"decoder.layers.1.{FC1}"].split(24), strict=True
    ):
        assert torch.equal(part[:24], own)
        assert not part[24:].any()
    assert torch.equal(fc2[:, :24], held.values[f"decoder.layers.1.{FC2}"])
    assert not fc2[:, 24:].any()


def test_experts_are_filled_up_by_some_of_zeros_that_are_never_chosen() -> None:
    narrow = model(NARROW_EXPERTS)
    held = Held(narrow)
    wide = Padded(held, one_width(narrow), VOCAB)
    router, bias, fc1 = (
        read_whole(wide, f"decoder.layers.2.mlp.{name}")
        for name in ("router.weight", "router.expert_bias", "experts.experts.linear_fc1.weight")
    )
    assert torch.equal(router[:3], held.values["decoder.layers.2.mlp.router.weight"])
    assert not router[3].any()
    assert torch.equal(bias[:3], held.values["decoder.layers.2.mlp.router.expert_bias"])
    assert bias[3] == NEVER_CHOSEN
    assert fc1.shape == (4, 32, 16)
    assert not fc1[3].any()
    assert not fc1[:, 8:].any()
    assert fc1[:3, :8].all()


def test_a_tensor_of_the_usual_width_is_read_as_it_is() -> None:
    narrow = model(NARROW_MLP)
    held = Held(narrow)
    wide = Padded(held, one_width(narrow), VOCAB)
    for name in (f"decoder.layers.4.{FC1}", "embedding.word_embeddings.weight"):
        assert torch.equal(read_whole(wide, name), held.values[name])
