"""Experts on sorted tokens against one plain MLP per expert."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.ops.experts import chosen_experts, expert_mlp, grouped_linear

COUNTS = [3, 0, 4]  # the middle expert has no tokens


def expert_inputs() -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    ups, downs = [normal(6, 5) for _ in COUNTS], [normal(5, 6) for _ in COUNTS]
    return normal(sum(COUNTS), 5), ups, downs, normal(sum(COUNTS))


def test_expert_mlp_equals_a_loop_over_experts() -> None:
    x, ups, downs, probs = expert_inputs()
    inputs = [x, probs, *ups, *downs]
    rows = zip(x.split(COUNTS), probs.split(COUNTS), ups, downs, strict=True)
    expected = torch.cat([((F.relu(t @ u.T) ** 2) * p[:, None]) @ d.T for t, p, u, d in rows])
    actual = expert_mlp(x, ups, downs, COUNTS, probs)
    torch.testing.assert_close(actual, expected)
    weight = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).view_as(actual)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )


def test_expert_mlp_and_grouped_linear_pass_gradcheck() -> None:
    x, ups, downs, probs = expert_inputs()

    def mlp(x: Tensor, probs: Tensor, *weights: Tensor) -> Tensor:
        return expert_mlp(x, weights[:3], weights[3:], COUNTS, probs)

    assert torch.autograd.gradcheck(mlp, (x, probs, *ups, *downs))
    assert torch.autograd.gradcheck(lambda x, *w: grouped_linear(x, w, COUNTS), (x, *ups))


def test_an_expert_without_tokens_gets_a_gradient_of_zeros() -> None:
    x, ups, downs, probs = expert_inputs()
    expert_mlp(x, ups, downs, COUNTS, probs).sum().backward()
    assert torch.equal(ups[1].grad, torch.zeros_like(ups[1]))
    assert torch.equal(downs[1].grad, torch.zeros_like(downs[1]))


def test_no_tokens_at_all_are_legal() -> None:
    x, ups, downs, probs = expert_inputs()
    y = expert_mlp(x[:0], ups, downs, [0, 0, 0], probs[:0])
    y.sum().backward()
    assert y.shape == (0, 5)
    assert torch.equal(ups[0].grad, torch.zeros_like(ups[0]))


def test_bfloat16_tokens_keep_their_type_beside_float32_probs() -> None:
    x, ups, downs, probs = expert_inputs()
    half = [t.detach().bfloat16().requires_grad_() for t in (x, *ups, *downs)]
    weights = probs.detach().float().requires_grad_()
    y = expert_mlp(half[0], half[1:4], half[4:], COUNTS, weights)
    y.sum().backward()
    assert y.dtype == half[0].grad.dtype == torch.bfloat16
    assert weights.grad.dtype == torch.float32


def test_counts_that_do_not_fit_are_refused() -> None:
    x, ups, downs, probs = expert_inputs()
    with pytest.raises(ValueError, match="2 counts for 3 experts"):
        grouped_linear(x, ups, [3, 4])
    with pytest.raises(ValueError, match="counts add up to 8, but there are 7 tokens"):
        expert_mlp(x, ups, downs, [3, 1, 4], probs)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_chosen_experts_of_a_token_are_summed_up_with_its_weights(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, probs = torch.randn(tokens, 5, generator=generator), torch.rand(tokens, 2)
    ups = [torch.randn(5, 7, generator=generator) for _ in range(6)]
    downs = [torch.randn(7, 4, generator=generator) for _ in range(6)]
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
    expected = torch.stack([
        sum(
            (F.relu(x[token] @ ups[expert]) ** 2 * prob @ downs[expert]
             for expert, prob in zip(chosen[token].tolist(), probs[token], strict=True)),
            torch.zeros(4),
        )
        for token in range(tokens)
    ])  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(chosen_experts(x, ups, downs, chosen, probs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_token_alone_has_the_bits_that_it_has_among_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 16, generator=generator).to(dtype)
    probs = torch.rand(5, 4, generator=generator)
    ups, downs = (
        [torch.randn(*shape, generator=generator).to(dtype) for _ in range(8)]
        for shape in ((16, 24), (24, 16))
    )
    # Experts apart for each token: GEMMs of several rows may round otherwise.
    chosen = torch.tensor([[3, 0, 2, 1], [5, 7, 6, 4]])
    both = chosen_experts(x[:2], ups, downs, chosen, probs[:2])
    for row in range(2):
        alone = chosen_experts(
            x[row : row + 1], ups, downs, chosen[row : row + 1], probs[row : row + 1]
        )
        assert torch.equal(alone, both[row : row + 1])
