"""Cross-entropy over a vocabulary split over two processes."""

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from hybrid_train.ops.vocab_parallel import cross_entropy
from tests.distributed.launch import RankFailedError, run_distributed


def _compare_with_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 5, 14, generator=generator)  # far apart: exp alone would overflow
    labels = torch.randint(14, (3, 5), generator=generator)
    weight = torch.rand(3, 5, generator=generator)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    (expected * weight).sum().backward()

    rank = dist.get_rank()
    part = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
    losses = cross_entropy(part, labels, dist.group.WORLD)
    (losses * weight).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(part.grad, whole.grad.chunk(2, dim=-1)[rank])


def _compare_padded_with_one_process() -> None:
    """13 tokens in 24 columns over 4 ranks: the third holds one token, the fourth none."""
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(3, 5, 24, generator=generator)
    labels = torch.randint(13, (3, 5), generator=generator)
    weight = torch.rand(3, 5, generator=generator)
    whole = logits.clone().requires_grad_()
    tokens = whole[..., :13].flatten(0, 1)
    expected = F.cross_entropy(tokens, labels.flatten(), reduction="none").view(3, 5)
    (expected * weight).sum().backward()

    rank = dist.get_rank()
    part = logits.chunk(4, dim=-1)[rank].clone().requires_grad_()
    losses = cross_entropy(part, labels, dist.group.WORLD, vocab_size=13)
    (losses * weight).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(part.grad, whole.grad.chunk(4, dim=-1)[rank])


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("rank one is broken")


def test_split_vocabulary_gives_the_losses_and_gradients_of_the_whole() -> None:
    run_distributed(_compare_with_one_process, 2)


def test_padding_of_a_split_vocabulary_has_no_influence_even_where_a_rank_holds_nothing_else() -> (
    None
):
    run_distributed(_compare_padded_with_one_process, 4)


def test_launcher_raises_the_error_of_a_rank() -> None:
    with pytest.raises(RankFailedError, match="rank one is broken"):
        run_distributed(_fail_on_rank_one, 2)
