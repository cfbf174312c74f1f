"""The norms against torch's, transformers' and finite differences."""

import pytest
import torch
from torch.nn import functional as F

from hybrid_train.ops.norm import gated_rms_norm, layer_norm_1p, rms_norm


def test_rms_norm_equals_torch_and_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("group_size", [8, 4, 2], ids="group={}".format)
@pytest.mark.parametrize("gated", [True, False], ids="gate={}".format)
def test_gated_norm_equals_gate_then_norm_of_each_group(group_size: int, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    y = x * F.silu(gate) if gated else x
    groups = y.view(2, 3, -1, group_size)
    expected = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    actual = gated_rms_norm(x, gate if gated else None, weight, 1e-5, group_size)
    torch.testing.assert_close(actual, expected.view(2, 3, 8) * weight)
    assert torch.autograd.gradcheck(
        lambda x, z, w: gated_rms_norm(x, z if gated else None, w, 1e-5, group_size) + 0 * z,
        (x.detach().requires_grad_(), gate.detach().requires_grad_(), weight),
    )


def test_bfloat16_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator).bfloat16().requires_grad_()
    y = rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    expected = rms_norm(x.detach().float(), torch.ones(8), 1e-5)
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=0)  # rounded once


def test_a_group_size_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size = 3: must divide the 8 channels"):
        gated_rms_norm(torch.ones(1, 8), None, torch.ones(8), 1e-5, 3)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_mean_is_over_the_channels_that_are_not_masked(grouped: bool) -> None:
    """Tiny inputs beside a large eps: by the mean of all channels eps would weigh more."""
    left, whole, group = 3, 8, 2 if grouped else 1
    generator = torch.Generator().manual_seed(0)
    small = 1e-3 * torch.randn(2, group, left, generator=generator, dtype=torch.float64)
    weight = torch.randn(group, whole, generator=generator, dtype=torch.float64)
    x = torch.zeros(2, group, whole, dtype=torch.float64)
    x[..., 1:4] = small
    channels = torch.tensor(float(left))

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if grouped:
            return gated_rms_norm(x.flatten(1), None, w.flatten(), 1e-5, whole, channels).view_as(x)
        return rms_norm(x, w, 1e-5, channels)

    found = norm(x, weight)
    expected = F.rms_norm(small, (left,), None, 1e-5) * weight[:, 1:4]
    torch.testing.assert_close(found[..., 1:4], expected)
    assert found.count_nonzero() == small.numel()
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(), weight.requires_grad_()))
    torch.testing.assert_close(found, norm(x, weight))  # recorded or not


def test_layer_norm_with_a_weight_of_0_is_the_plain_norm() -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    y = layer_norm_1p(x, torch.zeros(12), torch.zeros(12), 1e-5)
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (12,), eps=1e-5))
    assert torch.allclose(y.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_masked_layer_norm_is_that_of_the_channels_that_are_left_and_so_are_its_gradients() -> None:
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    left = kept.bool()
    x = (torch.randn(6, 10, dtype=torch.float64) * kept).requires_grad_()
    weight, bias = (torch.randn(10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    small = [one.detach()[..., left].requires_grad_() for one in (x, weight, bias)]
    whole = layer_norm_1p(x, weight, bias, 1e-5, kept)
    alone = layer_norm_1p(*small, 1e-5)
    assert torch.allclose(whole[:, left], alone, atol=1e-12)
    assert not whole[:, ~left].any()
    grad = torch.randn(6, 10, dtype=torch.float64)
    whole.backward(grad)
    alone.backward(grad[:, left])
    for one, other in zip((x, weight, bias), small, strict=True):
        assert torch.allclose(one.grad[..., left], other.grad, atol=1e-12)
    assert not weight.grad[~left].any()
