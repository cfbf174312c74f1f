"""Sampling against closed forms and against the logits warpers of `transformers`."""

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hybrid_train.generation.decode import (
    keep_top_k,
    keep_top_p,
    sample,
)


def random_logits(rows: int = 5, vocab: int = 97, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def draw(logits: Tensor, *, seed: int = 0, **settings: float) -> Tensor:
    return sample(logits, generator=torch.Generator().manual_seed(seed), **settings)


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = random_logits()
    assert sample(logits).equal(logits.argmax(-1))


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample(torch.tensor([[1.0, 2.0, 2.0]])).tolist() == [1]


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    logits = random_logits()
    assert draw(logits, temperature=5.0, top_k=1).equal(logits.argmax(-1))


def test_top_p_of_zero_is_greedy_at_any_temperature() -> None:
    logits = random_logits()
    assert draw(logits, temperature=5.0, top_p=0.0).equal(logits.argmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 10, 96, 97, 200])
def test_top_k_equals_the_warper_of_transformers(top_k: int) -> None:
    logits = random_logits()
    assert keep_top_k(logits, top_k).equal(TopKLogitsWarper(top_k)(None, logits.clone()))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_equals_the_warper_of_transformers(top_p: float) -> None:
    logits = random_logits()
    assert keep_top_p(logits, top_p).equal(TopPLogitsWarper(top_p)(None, logits.clone()))


@pytest.mark.parametrize("top_k", [1, 3, 97])
def test_top_k_keeps_exactly_k_where_no_two_are_equal(top_k: int) -> None:
    assert torch.isfinite(keep_top_k(random_logits(), top_k)).sum(-1).tolist() == [top_k] * 5


def test_top_k_keeps_equals_of_the_last_one() -> None:
    assert kept(keep_top_k(torch.tensor([[0.0, 3.0, 1.0, 1.0]]), 2)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(0.0, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2])]
)
def test_top_p_keeps_the_smallest_set_with_the_mass(top_p: float, tokens: list[int]) -> None:
    # Powers of two, so that the sums are exact.
    mass = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]])
    assert kept(keep_top_p(mass.log(), top_p)) == tokens


def test_top_p_takes_the_lower_id_of_equals() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [0, 1]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of two tokens the first has 4/7 of the mass, more than a half; of all four it has 0.4.
    assert kept(keep_top_p(keep_top_k(logits, 2), 0.5)) == [0]
    assert kept(keep_top_p(logits, 0.5)) == [0, 1]


def test_equal_generators_draw_equal_tokens() -> None:
    logits = random_logits()
    first = [draw(logits, seed=seed, temperature=1.0).tolist() for seed in range(10)]
    again = [draw(logits, seed=seed, temperature=1.0).tolist() for seed in range(10)]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) > 1


def test_frequencies_are_those_of_the_softmax_at_the_temperature() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 2.0]), 20_000
    tokens = draw(logits.repeat(draws, 1), temperature=2.0)
    share = torch.bincount(tokens, minlength=3) / draws
    # Standard deviation of a share is at most sqrt(1/4 / draws) = 0.0035; five of them.
    torch.testing.assert_close(share, (logits / 2).softmax(-1), atol=0.018, rtol=0)


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = random_logits().bfloat16()
    assert draw(logits, temperature=1.0).equal(draw(logits.float(), temperature=1.0))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        sample(random_logits(), **wrong)
