"""The choice of tokens against closed forms and against the logits processors of transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrid_train.data.order import GOLDEN
from hybrid_train.generation.sampling import (
    Place,
    Sampling,
    choose,
    draw,
    fractions,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repeated,
)

DRAWS = 8_000


def far(freedom: int) -> float:
    """What a chi-square of so many degrees of freedom exceeds by chance once in a million.

    The cube root is nearly normal (Wilson and Hilferty, PNAS 17, 1931); 4.75 standard deviations.
    """
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 4.75 * spread**0.5) ** 3)


def random_logits(rows: int = 5, vocab: int = 97, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor) -> list[int]:
    return torch.isfinite(logits[0]).nonzero().flatten().tolist()


def places(count: int, *, before: Sequence[int] = (), **settings: float) -> list[Place]:
    """Places of as many answers, whose seeds follow each other."""
    return [Place(Sampling(**{"seed": row, **settings}), 0, before) for row in range(count)]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = random_logits()
    assert choose(logits, places(5)).equal(logits.argmax(-1))


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(torch.tensor([[1.0, 2.0, 2.0]]), places(1)).tolist() == [1]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_narrowest_filters_are_greedy_at_any_temperature(filters: dict[str, float]) -> None:
    logits = random_logits()
    assert choose(logits, places(5, temperature=5.0, **filters)).equal(logits.argmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 10, 96, 97, 200])
def test_top_k_equals_the_warper_of_transformers(top_k: int) -> None:
    logits = random_logits()
    assert keep_top_k(logits, top_k).equal(TopKLogitsWarper(top_k)(None, logits.clone()))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_equals_the_warper_of_transformers(top_p: float) -> None:
    logits = random_logits()
    assert keep_top_p(logits, top_p).equal(TopPLogitsWarper(top_p)(None, logits.clone()))


@pytest.mark.parametrize("min_p", [0.001, 0.02, 0.3, 1.0])
def test_min_p_equals_the_warper_of_transformers(min_p: float) -> None:
    logits = random_logits()
    assert keep_min_p(logits, min_p).equal(MinPLogitsWarper(min_p)(None, logits.clone()))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_the_penalty_equals_the_processor_of_transformers(penalty: float) -> None:
    logits = random_logits(2)
    before = [[3, 4, 4, 96], [0, 0, 1, 2]]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(before), logits.clone())
    assert penalize_repeated(logits, before, penalty).equal(expected)


def test_a_token_beyond_the_vocabulary_has_no_penalty_to_get() -> None:
    logits = random_logits(1)
    assert penalize_repeated(logits, [[97, 500]], 2.0).equal(logits)


def test_all_settings_together_draw_from_what_transformers_leaves() -> None:
    logits = torch.tensor([0.5, 1, 2, 4])[:, None] / 3 * random_logits(4, seed=3)
    before = [[5, 5, *row.topk(3).indices.tolist()] for row in logits]
    settings = {
        "repetition_penalty": 1.7, "temperature": 1.9, "top_k": 9, "top_p": 0.8, "min_p": 0.3,
    }  # fmt: skip
    processors = [
        RepetitionPenaltyLogitsProcessor(1.7),
        TemperatureLogitsWarper(1.9),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.3),
    ]

    def left(some: list[Any]) -> Tensor:
        scores = LogitsProcessorList(some)(torch.tensor(before), logits.clone())
        return scores.double().softmax(-1)

    shares = left(processors)
    for one in processors:  # each has something to do beside the others
        assert not left([other for other in processors if other is not one]).equal(shares)
    for row, share in enumerate(shares):
        asked = places(DRAWS, before=before[row], **settings)
        tokens = choose(logits[row].expand(DRAWS, -1), asked)
        assert chi_square(tokens, share) < far(len(share.nonzero()) - 1)


def chi_square(tokens: Tensor, share: Tensor) -> float:
    """Distance of counts from what is expected of them; infinite where one is impossible."""
    found = torch.bincount(tokens, minlength=len(share)).double()
    expected = share.double() * len(tokens)
    if bool((found[expected == 0] > 0).any()):
        return float("inf")
    some = expected > 0
    return float(((found - expected)[some] ** 2 / expected[some]).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_over_seeds_are_those_of_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5, -2.0, 0.9, 1.1])
    tokens = choose(logits.expand(DRAWS, -1), places(DRAWS, temperature=temperature))
    assert chi_square(tokens, (logits.double() / temperature).softmax(-1)) < far(7)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_within_one_answer_are_those_of_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.5, -2.0, 0.9, 1.1])
    sampling = Sampling(temperature=temperature, seed=2**64 - 1)
    one = [Place(sampling, number, ()) for number in range(DRAWS)]
    tokens = choose(logits.expand(DRAWS, -1), one)
    assert chi_square(tokens, (logits.double() / temperature).softmax(-1)) < far(7)


def test_frequencies_with_top_p_are_those_of_the_nucleus() -> None:
    share = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    nucleus = torch.tensor([0.0, 0.4, 0.0, 0.25, 0.2]) / 0.85
    rows = share.log().expand(DRAWS, -1)
    tokens = choose(rows, places(DRAWS, temperature=1.0, top_p=0.8))
    assert chi_square(tokens, nucleus) < far(2)


def test_the_draws_of_two_seeds_and_of_two_numbers_are_independent() -> None:
    """Pairs of neighbours fill a square of 8 x 8 evenly."""
    for pair in ([(0, 0), (1, 0)], [(0, 0), (0, 1)], [(0, 1), (1, 0)]):
        cells = torch.zeros(DRAWS, dtype=torch.int64)
        for seed, number in pair:
            sampling = [Sampling(seed=seed + 2 * step) for step in range(DRAWS)]
            some = fractions([Place(one, number, ()) for one in sampling])
            cells = cells * 8 + (some * 8).long()
        assert chi_square(cells, torch.full((64,), 1 / 64)) < far(63)


def test_no_seed_repeats_the_draws_of_another_a_token_later() -> None:
    """As it would where numbers count on from the seed itself, in steps of the golden ratio."""
    one = fractions([Place(Sampling(seed=int(GOLDEN)), number, ()) for number in range(9)])
    other = fractions([Place(Sampling(seed=0), number + 1, ()) for number in range(9)])
    assert not set(one.tolist()) & set(other.tolist())


def test_a_choice_depends_on_seed_and_number_and_not_on_the_batch() -> None:
    logits = random_logits(6)
    mixed = [
        Place(Sampling(temperature=1.0, seed=5), 3, ()),
        Place(Sampling(), 0, ()),
        Place(Sampling(temperature=1.0, top_k=4, seed=5), 3, ()),
        Place(Sampling(temperature=0.8, top_p=0.9, seed=2**63), 10**6, ()),
        Place(Sampling(temperature=1.0, seed=6), 3, ()),
        Place(Sampling(repetition_penalty=9.0), 4, (int(logits[5].argmax()),)),
    ]
    together = choose(logits, mixed).tolist()
    alone = [int(choose(logits[[row]], [place])) for row, place in enumerate(mixed)]
    backwards = choose(logits.flip(0), mixed[::-1]).tolist()[::-1]
    assert together == alone == backwards
    assert together[5] != int(logits[5].argmax())


class _Unread(list[int]):
    def __iter__(self) -> object:
        raise AssertionError("the tokens before were read")


def test_the_tokens_before_are_read_by_a_penalty_alone() -> None:
    greedy_and_drawn = [Place(Sampling(temperature=t), 0, _Unread()) for t in (0.0, 1.0)]
    choose(random_logits(2), greedy_and_drawn)


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, last).tolist() == [3]


def test_fractions_lie_in_the_unit_interval_without_its_end() -> None:
    some = fractions(places(10_000))
    assert float(some.min()) >= 0
    assert float(some.max()) <= 1 - 2.0**-53
    assert some.dtype == torch.float64


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


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = random_logits().bfloat16()
    asked = places(5, temperature=1.3)
    assert choose(logits, asked).equal(choose(logits.float(), asked))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**{name: value})
