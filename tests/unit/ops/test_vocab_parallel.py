"""Cross-entropy in one process against torch's; the split one is in tests/distributed."""

import pytest
import torch
from torch.nn import functional as F

from hybrid_train.ops.vocab_parallel import cross_entropy


@pytest.mark.parametrize("vocabulary", [7, 5000], ids="vocabulary={}".format)
def test_loss_and_gradient_equal_torch(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(2, 2, vocabulary, generator=generator)).requires_grad_()
    labels = torch.randint(vocabulary, (2, 2), generator=generator)
    weight = torch.rand(2, 2, generator=generator)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 2)
    actual = cross_entropy(logits, labels)
    # 30 * 4 is the size of the terms that the loss is the difference of.
    torch.testing.assert_close(actual, expected, rtol=0, atol=120 * 2**-22)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), logits),
        torch.autograd.grad((expected * weight).sum(), logits),
    )


def test_columns_of_padding_have_no_probability_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 11, generator=generator).requires_grad_()
    labels = torch.randint(7, (2, 3), generator=generator)
    padded = torch.cat([logits[..., :7].detach(), torch.full((2, 3, 4), 80.0)], -1).requires_grad_()
    expected = F.cross_entropy(logits[..., :7].flatten(0, 1), labels.flatten(), reduction="none")
    actual = cross_entropy(padded, labels, vocab_size=7)
    torch.testing.assert_close(actual.flatten(), expected)
    (gradient,) = torch.autograd.grad(actual.sum(), padded)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(gradient[..., 7:], torch.zeros(2, 3, 4))


def test_the_loss_of_a_hopeless_label_is_finite() -> None:
    logits = torch.tensor([[0.0, 500.0]])  # its probability, exp(-500), is zero in float32
    assert cross_entropy(logits, torch.tensor([0])).item() == 500.0


def test_cross_entropy_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 3), generator=generator)
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, labels), (logits,))


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = logits.detach().clone()
    cross_entropy(logits, torch.tensor([0, 1, 2])).sum().backward()
    assert torch.equal(logits, before)


def test_bfloat16_logits_give_float32_losses() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = cross_entropy(logits.requires_grad_(), torch.tensor([0, 1, 2]))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="labels have shape"):
        cross_entropy(torch.ones(3, 5), torch.zeros(2, dtype=torch.long))
