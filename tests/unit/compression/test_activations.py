"""Scores of each axis are those that a twin in float64 computes of the weights, layer by layer."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import Layer, layers
from hybrid_train.compression.ranking import HIDDEN, LAYERS, name_of
from hybrid_train.data.batch import Row, stack
from hybrid_train.schema.importance import ExpertMetric, ImportanceJob
from tests.scored import frozen_network, packed_rows, scores_of, settings, whole_rows
from tests.tiny import MEGATRON_WARNINGS, alone, tiny_job

pytestmark = MEGATRON_WARNINGS
EPS, TOP_K, SCALE = 1e-5, 2, 2.5


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


class Twin:
    """What the elements of a layer show, in float64; tokens in front: [B, S, ...]."""

    def __init__(self, layer: Layer, module: Any) -> None:
        self.layer = layer
        self.weights = {name: one.double() for name, one in module.state_dict().items()
                        if one is not None and torch.is_tensor(one)}  # fmt: skip

    def shows(self, h: Tensor, same: Tensor) -> dict[Any, Tensor]:
        """Return the values of the norm ("norm") and of each axis of tokens of rows.

        Args:
            h: what goes into the layer.
            same: whether two tokens are of one document, [B, S, S].
        """
        w, sizes, letter = self.weights, self.layer.sizes, self.layer.letter
        if letter == "M":
            n = normed(h, w["mixer.in_proj.layer_norm_weight"])
            inner = sizes.ssm_heads * sizes.ssm_head_dim
            return {"norm": n, Axis.ssm_heads: n @ w["mixer.in_proj.weight"][inner : 2 * inner].T}
        if letter == "-":
            n = normed(h, w["mlp.linear_fc1.layer_norm_weight"])
            return {"norm": n, Axis.ffn: (n @ w["mlp.linear_fc1.weight"].T).relu().square()}
        if letter == "*":
            n = normed(h, w["self_attention.linear_qkv.layer_norm_weight"])
            return {"norm": n, Axis.heads: self._heads(n, same)}
        n = normed(h, w["pre_mlp_layernorm.weight"])
        shared = (n @ w["mlp.shared_experts.linear_fc1.weight"].T).relu().square()
        latent = n @ w["mlp.fc1_latent_proj.weight"].T
        return {"norm": n, Axis.shared_ffn: shared, Axis.latent: latent}

    def _heads(self, n: Tensor, same: Tensor) -> Tensor:
        sizes = self.layer.sizes
        share, width = sizes.heads // sizes.kv_groups, sizes.head_dim
        qkv = (n @ self.weights["self_attention.linear_qkv.weight"].T).unflatten(
            -1, (sizes.kv_groups, share + 2, width)
        )
        q, k, v = qkv.split([share, 1, 1], dim=-2)
        scores = torch.einsum("bsghd,btgd->bghst", q, k[..., 0, :]) / width**0.5
        seen = same & torch.ones_like(same[0]).tril()
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        out = torch.einsum("bghst,btgd->bsghd", weights, v[..., 0, :])
        return out.norm(dim=-1).flatten(2)

    def experts(self, h: Tensor, without: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights [T, E], weighed inner neurons [T, E, F], outputs [T, E, latent]."""
        w = self.weights
        n = normed(h, w["pre_mlp_layernorm.weight"]).flatten(0, 1)
        scores = (n @ w["mlp.router.weight"].T).sigmoid()
        biased = scores + w["mlp.router.expert_bias"]
        if without is not None:
            biased[:, without] = -torch.inf
        chosen = torch.zeros_like(scores).scatter(1, biased.topk(TOP_K).indices, 1)
        weights = scores * chosen
        weights = SCALE * weights / weights.sum(-1, keepdim=True)
        latent = n @ w["mlp.fc1_latent_proj.weight"].T
        ups = [w[f"mlp.experts.linear_fc1.weight{one}"] for one in range(scores.shape[1])]
        downs = [w[f"mlp.experts.linear_fc2.weight{one}"] for one in range(scores.shape[1])]
        inner = torch.stack([(latent @ up.T).relu().square() for up in ups], dim=1)
        inner = inner * weights[..., None]
        outer = torch.stack([inner[:, one] @ down.T for one, down in enumerate(downs)], dim=1)
        return weights, inner, outer


def l2_of_means(values: Tensor, counted: Tensor) -> Tensor:
    """The root over rows of the mean square of the mean over tokens of |x|; values [B, S, C]."""
    means = [row[own].abs().mean(0) for row, own in zip(values, counted, strict=True)]
    return torch.stack(means).square().mean(0).sqrt()


class Seen:
    """A tiny model that was scored, what went into its layers, and which tokens count."""

    def __init__(self, rows: list[Row], job: ImportanceJob) -> None:
        from hybrid_train.compression.activations import modules_of_layers

        with alone() as groups:
            tiny = tiny_job("MEM*M-")
            network = frozen_network(tiny, groups)
            (chunk,) = network.chunks
            self.model, self.final = tiny.model, chunk.decoder.final_norm.weight.double()
            self.scores = scores_of(network, tiny.model, rows, job, microbatch=2)
            self.given: dict[str, list[Tensor]] = {}
            self.twins = []
            for layer, module in modules_of_layers(chunk, tiny.model):
                self.twins.append(Twin(layer, module))
                states = self.given.setdefault(layer.prefix, [])
                module.register_forward_pre_hook(
                    lambda _, __, named, states=states: states.append(named["hidden_states"]),
                    with_kwargs=True,
                )
            chunk.decoder.final_norm.register_forward_pre_hook(
                lambda _, given: self.given.setdefault("end", []).append(given[0])
            )
            batch = stack(rows)
            with torch.no_grad():
                chunk(batch.tokens, sequence_index=batch.sequence_index, padding=batch.padding)
        padding = batch.padding
        self.counted = torch.ones(batch.tokens.shape, dtype=torch.bool)
        self.counted = self.counted if padding is None else ~padding
        index = batch.sequence_index
        index = torch.zeros(batch.tokens.shape) if index is None else index
        self.same = index[:, :, None] == index[:, None]

    def into(self, name: str) -> Tensor:
        """What went into a layer, [B, S, H]."""
        return self.given[name][0].transpose(0, 1).double()

    def each(self) -> Iterator[tuple[Twin, dict[Any, Tensor]]]:
        for twin in self.twins:
            yield twin, twin.shows(self.into(twin.layer.prefix), self.same)


ROWS = {"whole": whole_rows, "packed": packed_rows}


@pytest.fixture(scope="module", params=ROWS)
def seen(request: pytest.FixtureRequest) -> Seen:
    return Seen(ROWS[request.param](4), settings())


def close(found: Tensor, wanted: Tensor) -> None:
    np.testing.assert_allclose(found.double(), wanted, rtol=2e-5, atol=1e-7)


def test_channels_are_scored_by_the_outputs_of_all_norms(seen: Seen) -> None:
    norms = [l2_of_means(shows["norm"], seen.counted) for _, shows in seen.each()]
    norms.append(l2_of_means(normed(seen.into("end"), seen.final), seen.counted))
    close(seen.scores[HIDDEN], torch.stack(norms).sum(0))


def test_neurons_heads_and_latent_channels_are_scored_by_what_the_next_linear_reads(
    seen: Seen,
) -> None:
    compared = set()
    for twin, shows in seen.each():
        del shows["norm"]
        for axis, values in shows.items():
            found = seen.scores[name_of(twin.layer, axis)]
            close(found.flatten(), l2_of_means(values, seen.counted))
            compared.add(axis)
    assert compared == {Axis.ssm_heads, Axis.ffn, Axis.heads, Axis.shared_ffn, Axis.latent}


def test_a_group_of_heads_has_the_sum_of_its_heads(seen: Seen) -> None:
    layer = layers(seen.model)[3]
    heads = seen.scores[name_of(layer, Axis.heads)]
    close(seen.scores[name_of(layer, Axis.kv_groups)], heads.view(2, 2).sum(1))


def test_experts_are_scored_over_their_own_tokens(seen: Seen) -> None:
    twin = seen.twins[1]
    weights, inner, outer = twin.experts(seen.into(twin.layer.prefix))
    own = (weights > 0) & seen.counted.flatten()[:, None]
    numbers = own.sum(0).clamp(min=1)
    norms = (outer.norm(dim=-1) * own).sum(0) / numbers
    close(seen.scores[name_of(twin.layer, Axis.experts)], norms)
    means = (inner.abs() * own[..., None]).sum(0) / numbers[:, None]
    close(seen.scores[name_of(twin.layer, Axis.expert_ffn)], means)


def test_layers_are_scored_by_the_angle_that_they_turn_tokens_by(seen: Seen) -> None:
    names = [*(twin.layer.prefix for twin in seen.twins), "end"]
    for number, (one, after) in enumerate(itertools.pairwise(names)):
        cosine = functional.cosine_similarity(seen.into(one), seen.into(after), dim=-1)
        means = [row[own].mean() for row, own in zip(1 - cosine, seen.counted, strict=True)]
        close(seen.scores[LAYERS + "cosine"][number], torch.stack(means).mean())


@pytest.mark.parametrize("kind", ROWS)
def test_an_expert_may_be_scored_by_its_layer_without_it(kind: str) -> None:
    seen = Seen(ROWS[kind](4), settings(experts=ExpertMetric.without))
    twin = seen.twins[1]
    h, own = seen.into(twin.layer.prefix), seen.counted.flatten()
    up = twin.weights["mlp.fc2_latent_proj.weight"].T
    whole = twin.experts(h)[2].sum(1) @ up
    wanted = [
        (twin.experts(h, expert)[2].sum(1) @ up - whole)[own].square().mean() for expert in range(4)
    ]
    close(seen.scores[name_of(twin.layer, Axis.experts)], torch.stack(wanted))


def test_norms_of_mtp_blocks_count_unless_that_is_off() -> None:
    found = {}
    with alone() as groups:
        for pattern, counts in (("M*", True), ("M*/M", False), ("M*/M", True)):
            tiny = tiny_job(pattern)
            network = frozen_network(tiny, groups)
            asked = settings(mtp_norms=counts)
            found[pattern, counts] = scores_of(network, tiny.model, whole_rows(2), asked)[HIDDEN]
    torch.testing.assert_close(found["M*/M", False], found["M*", True], rtol=1e-6, atol=0)
    # Those of its layer, of the token, of the hidden state, and the last one; each about 1.
    assert (found["M*/M", True] - found["M*", True]).mean() > 2.5


def test_listening_leaves_no_trace() -> None:
    with alone() as groups:
        tiny = tiny_job("ME*-/E")
        network = frozen_network(tiny, groups)
        (chunk,) = network.chunks
        batch = stack(whole_rows(2))
        places = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        before = chunk(batch.tokens, places, read=lambda out: out.mtp_hidden[0])
        scores_of(network, tiny.model, whole_rows(2), settings(experts=ExpertMetric.without))
        after = chunk(batch.tokens, places, read=lambda out: out.mtp_hidden[0])
        assert torch.equal(before, after)
        for module in chunk.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert getattr(module, "edited", None) is None
