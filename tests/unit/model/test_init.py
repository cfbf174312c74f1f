"""First values of the weights: every parameter has the distribution that its name asks for."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS
STD = 0.9 / math.sqrt(32)  # of tiny_job
RESIDUAL = STD / math.sqrt(6)  # 6 layers in the main stack
SIGMAS = 5  # a sound draw is outside once in 1.7 million; the draws are fixed by the seed anyhow

# The last words of a name, without numbers of experts -> standard deviation of a normal.
NORMAL = {
    "word_embeddings.weight": STD,
    "output_layer.weight": STD,
    "in_proj.weight": STD,
    "linear_qkv.weight": STD,
    "linear_fc1.weight": STD,
    "router.weight": STD,
    "fc1_latent_proj.weight": STD,
    "eh_proj.weight": STD,
    "out_proj.weight": RESIDUAL,
    "linear_proj.weight": RESIDUAL,
    "linear_fc2.weight": RESIDUAL,
    "fc2_latent_proj.weight": RESIDUAL,
}
ONES = (
    "norm.weight", "layer_norm_weight", "layernorm.weight", "enorm.weight", "hnorm.weight",
    "mixer.D",
)  # fmt: skip


def ending(name: str) -> str:
    return ".".join(name.rstrip("0123456789").split(".")[-2:])


@pytest.fixture(scope="module")
def weights(groups: Any) -> dict[str, Tensor]:
    return dict(tiny_model(tiny_job(), groups).named_parameters())


def assert_uniform(value: Tensor, low: float, high: float) -> None:
    """Bounds are hard; the mean of n draws is off by (high - low) / sqrt(12 n)."""
    assert low <= value.min().item()
    assert value.max().item() <= high
    off = abs(value.mean().item() - (low + high) / 2)
    assert off <= SIGMAS * (high - low) / math.sqrt(12 * value.numel())


def test_every_parameter_follows_its_rule(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        value, n = weight.detach(), weight.numel()
        if ending(name) in NORMAL:
            std = NORMAL[ending(name)]
            assert abs(value.mean().item()) <= SIGMAS * std / math.sqrt(n), name
            assert abs(value.std().item() - std) <= SIGMAS * std / math.sqrt(2 * n), name
        elif name.endswith(("conv1d_weight", "conv1d_bias")):
            assert_uniform(value, -0.5, 0.5)  # 1 / sqrt(4 taps)
        elif name.endswith("A_log"):
            assert_uniform(value.exp(), 1 - 1e-6, 16 + 1e-5)
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(value)
            assert_uniform(step.log(), math.log(1e-3) - 1e-5, math.log(1e-1) + 1e-5)
        else:
            assert name.endswith(ONES), f"no rule for {name}"
            assert torch.equal(value, torch.ones_like(value)), name


def test_all_rules_are_met_by_some_parameter(weights: dict[str, Tensor]) -> None:
    assert set(NORMAL) <= {ending(name) for name in weights}


def test_no_two_tensors_hold_the_same_numbers(weights: dict[str, Tensor]) -> None:
    """Each has a generator of its own: layers, experts and packed parts are all different."""
    drawn = [w.detach().flatten()[:4] for name, w in weights.items() if not name.endswith(ONES)]
    firsts = {tuple(values.tolist()) for values in drawn}
    assert len(firsts) == len(drawn)
    packed = weights["decoder.layers.0.mixer.in_proj.weight"]
    z, x = packed[:64], packed[64:128]  # 4 heads of width 16 each
    assert not torch.equal(z, x)


def test_the_seed_decides_and_nothing_else(groups: Any, weights: dict[str, Tensor]) -> None:
    torch.manual_seed(5)
    job = tiny_job(EVERY_KIND)
    same = dict(tiny_model(job, groups).named_parameters())
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    job.train.seed += 1
    for name, weight in tiny_model(job, groups).named_parameters():
        if not name.endswith(ONES):
            assert not torch.equal(weight, weights[name]), name


def test_given_std_replaces_that_of_the_family(groups: Any) -> None:
    job = tiny_job("-")
    job.model.init_std = 0.5
    value = tiny_model(job, groups).output_layer.weight.detach()
    assert abs(value.std().item() - 0.5) <= SIGMAS * 0.5 / math.sqrt(2 * value.numel())
