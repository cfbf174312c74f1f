"""Cross-entropy of one chunk against torch's; more of it is in test_logits.py."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.ops.logits import CrossEntropy, HeadPart


def loss_and_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[1]
    head = HeadPart(torch.empty(rows, 1), vocab_size or rows)
    values, pullback = CrossEntropy(labels)(logits, slice(0, len(logits)), head)
    return values, pullback(weights)


@pytest.mark.parametrize("vocabulary", [7, 5000], ids="vocabulary={}".format)
def test_loss_and_gradient_equal_torch(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(4, vocabulary, generator=generator)).requires_grad_()
    labels = torch.randint(vocabulary, (4,), generator=generator)
    weights = torch.rand(4, generator=generator)
    expected = F.cross_entropy(logits, labels, reduction="none")
    actual, gradient = loss_and_gradient(logits.detach(), labels, weights)
    # 30 * 4 is the size of the terms that the loss is the difference of.
    torch.testing.assert_close(actual, expected, rtol=0, atol=120 * 2**-22)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(gradient, wanted)


def test_columns_of_padding_have_no_probability_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator)
    labels = torch.randint(7, (6,), generator=generator)
    padded = torch.cat([logits[:, :7], torch.full((6, 4), 80.0)], -1)
    expected, wanted = loss_and_gradient(logits[:, :7], labels, torch.ones(6))
    actual, gradient = loss_and_gradient(padded, labels, torch.ones(6), vocab_size=7)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient[:, :7], wanted)
    assert torch.equal(gradient[:, 7:], torch.zeros(6, 4))


def test_the_loss_of_a_hopeless_label_is_finite() -> None:
    logits = torch.tensor([[0.0, 500.0]])  # its probability, exp(-500), is zero in float32
    assert loss_and_gradient(logits, torch.tensor([0]), torch.ones(1))[0].item() == 500.0


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    loss_and_gradient(logits, torch.tensor([0, 1, 2]), torch.ones(3))
    assert torch.equal(logits, before)


def test_bfloat16_logits_give_float32_losses() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss, gradient = loss_and_gradient(logits, torch.tensor([0, 1, 2]), torch.ones(3))
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
