"""Angles of positions are those of transformers and of the formulas, and only distances matter."""

import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from hybrid_train.ops.rope import angles, frequencies, turn
from hybrid_train.schema.model import Rope, RopeScaling

HEAD, ORIGINAL, LONGEST = 16, 64, 512


def llama3(factor: float) -> Rope:
    return Rope(theta=500_000.0, scaling=RopeScaling.llama3, factor=factor, original_length=8192)


def longrope() -> Rope:
    pairs = range(6)  # three quarters of a head
    return Rope(
        theta=10_000.0, fraction=0.75, scaling=RopeScaling.longrope, original_length=ORIGINAL,
        maximum_length=LONGEST, short_factors=[1 + 0.1 * one for one in pairs],
        long_factors=[1.5 + one for one in pairs],
    )  # fmt: skip


def cosines(rope: Rope, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of all positions of a row, [L, channels]."""
    found = angles(frequencies(rope, HEAD, length), torch.arange(length))
    return found.cos() * rope.magnitude, found.sin() * rope.magnitude


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_turns_as_transformers_does_to_the_bit_at_position_8000(factor: float) -> None:
    config = LlamaConfig(
        hidden_size=HEAD, num_attention_heads=1, head_dim=HEAD, max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(9000)[None])
    for ours, other in zip(cosines(llama3(factor), 9000), theirs, strict=True):
        assert torch.equal(ours, other[0])


def test_another_factor_shows_at_position_8000_and_hardly_at_16() -> None:
    by_eight, by_many = cosines(llama3(8.0), 8001)[0], cosines(llama3(32.0), 8001)[0]
    apart = (by_eight - by_many).abs().amax(dim=-1)
    assert apart[16] < 1e-3
    assert apart[8000] > 0.1


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_longrope_takes_the_list_and_the_magnitude_of_transformers(length: int) -> None:
    rope = longrope()
    config = Phi3Config(
        hidden_size=HEAD, num_attention_heads=1, max_position_embeddings=LONGEST,
        original_max_position_embeddings=ORIGINAL, partial_rotary_factor=0.75, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
            "short_factor": rope.short_factors, "long_factor": rope.long_factors,
            "original_max_position_embeddings": ORIGINAL,
        },
    )  # fmt: skip
    theirs = Phi3RotaryEmbedding(config)(torch.empty(1), torch.arange(length)[None])
    for ours, other in zip(cosines(rope, length), theirs, strict=True):
        assert torch.equal(ours, other[0])


def test_the_magnitude_of_phi_4_mini_is_as_published() -> None:
    rope = Rope(scaling=RopeScaling.longrope, original_length=4096, maximum_length=131_072)
    assert math.isclose(rope.magnitude, 1.190238, abs_tol=5e-7)


def test_a_turned_pair_is_a_complex_number_times_a_root_of_unity() -> None:
    rope = Rope(theta=100.0, fraction=0.5)
    x = torch.randn(7, HEAD, dtype=torch.float64)
    found = angles(frequencies(rope, HEAD, 7), torch.arange(7)).double()
    y = turn(x, found.cos(), found.sin())
    half = HEAD // 4
    number = torch.complex(x[:, :half], x[:, half : 2 * half])
    steps = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    wanted = number * torch.exp(1j * torch.arange(7)[:, None] * steps)
    assert torch.allclose(torch.complex(y[:, :half], y[:, half : 2 * half]), wanted, atol=1e-6)
    assert torch.equal(y[:, 2 * half :], x[:, 2 * half :]), "the rest of a head is not turned"


def test_products_of_turned_queries_and_keys_depend_on_their_distance_alone() -> None:
    rope = Rope(theta=100.0)
    query, key = torch.randn(2, HEAD, dtype=torch.float64)
    found = angles(frequencies(rope, HEAD, 60), torch.arange(60)).double()

    def product(at: int, other: int) -> float:
        one, two = (turn(x, found[p].cos(), found[p].sin()) for x, p in ((query, at), (key, other)))
        return float(one @ two)

    assert math.isclose(product(5, 2), product(55, 52), rel_tol=1e-5)
    assert not math.isclose(product(5, 2), product(5, 3), rel_tol=1e-2)
