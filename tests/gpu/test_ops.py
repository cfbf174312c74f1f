"""The kernels of mamba-ssm and causal-conv1d against the references of hybrid_train.ops.

Written for a GPU and not yet run on one: the machine of the trunk has none.
"""

import pytest
import torch
from torch import Tensor

from hybrid_train.ops.attention import causal_attention
from hybrid_train.ops.conv import causal_conv
from hybrid_train.ops.mixer import mixer_forward
from hybrid_train.ops.norm import gated_rms_norm
from hybrid_train.ops.scan import chunked_scan, sequential_scan
from tests.packed import index_of, spans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH, LENGTH, HEADS, WIDTH, GROUPS, STATE = 2, 200, 8, 64, 2, 128  # 200: no multiple of 64
# The kernels multiply in TF32 or in parts of bfloat16; 2^-8 of the largest value covers both.
RELATIVE = 2**-8


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).cuda()


def close(actual: Tensor, expected: Tensor) -> None:
    limit = RELATIVE * float(expected.detach().abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=limit)


def scan_operands() -> list[Tensor]:
    x = normal(BATCH, LENGTH, HEADS, WIDTH)
    dt = 0.1 * normal(BATCH, LENGTH, HEADS).sigmoid()
    a = -16 * normal(HEADS).sigmoid()
    b, c = normal(2, BATCH, LENGTH, GROUPS, STATE)
    return [t.requires_grad_() for t in (x, dt, a, b.clone(), c.clone(), normal(HEADS))]


def test_chunk_kernel_equals_sequential_scan_forward_and_backward() -> None:
    kernel = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    x, dt, a, b, c, d = operands = scan_operands()
    expected, last = sequential_scan(x, dt, a, b, c, d=d)
    actual, state = kernel.mamba_chunk_scan_combined(
        x, dt, a, b, c, 64, D=d, return_final_states=True
    )
    close(actual, expected)
    close(state, last)
    weight = normal(*expected.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), operands)
    found = torch.autograd.grad((actual * weight).sum(), operands)
    for left, right in zip(found, wanted, strict=True):
        close(left, right)


def test_chunked_scan_on_the_gpu_equals_sequential_scan() -> None:
    x, dt, a, b, c, d = scan_operands()
    expected, last = sequential_scan(x, dt, a, b, c, d=d)
    actual, state = chunked_scan(x, dt, a, b, c, chunk=64, d=d)
    close(actual, expected)
    close(state, last)


def test_fused_mixer_kernel_equals_our_mixer() -> None:
    pytest.importorskip("causal_conv1d")
    kernel = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    packed = normal(BATCH, LENGTH, HEADS * WIDTH + channels + HEADS).requires_grad_()
    weight, bias = normal(channels, 4), normal(channels)
    dt_bias, a, d = normal(HEADS) - 3, -normal(HEADS).exp(), normal(HEADS)
    expected = mixer_forward(
        packed, weight, bias, dt_bias, a, d, head_width=WIDTH, groups=GROUPS, chunk=64
    )
    actual = kernel.mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, a, D=d, chunk_size=64, activation="silu",
        headdim=WIDTH, ngroups=GROUPS, norm_before_gate=False,
    )  # fmt: skip
    close(actual, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), packed)[0] for y in (actual, expected))
    close(found, wanted)


def test_fused_mixer_kernel_keeps_documents_apart_as_ours_does() -> None:
    pytest.importorskip("causal_conv1d")
    kernel = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    packed = normal(BATCH, LENGTH, HEADS * WIDTH + channels + HEADS).requires_grad_()
    weight, bias = normal(channels, 4), normal(channels)
    dt_bias, a, d = normal(HEADS) - 3, -normal(HEADS).exp(), normal(HEADS)
    # Within chunks of 64, along their ends, over several; documents of fewer tokens than taps.
    index = index_of([30, 34, 1, 2, 133], [64, 100, 36]).cuda()
    expected = mixer_forward(
        packed, weight, bias, dt_bias, a, d, head_width=WIDTH, groups=GROUPS, chunk=64,
        sequence_index=index,
    )  # fmt: skip
    actual = kernel.mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, a, D=d, chunk_size=64, activation="silu",
        headdim=WIDTH, ngroups=GROUPS, norm_before_gate=False, seq_idx=index,
    )  # fmt: skip
    close(actual, expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), packed)[0] for y in (actual, expected))
    close(found, wanted)


def test_masked_attention_on_the_gpu_equals_that_of_single_documents() -> None:
    q, k, v = normal(LENGTH, BATCH, 4, WIDTH), *normal(2, LENGTH, BATCH, 2, WIDTH)
    index = index_of([30, 34, 1, 2, 133], [64, 100, 36])
    found = causal_attention(q, k, v, index.cuda())
    for row, start, end in spans(index):
        part = (slice(start, end), slice(row, row + 1))
        close(found[part], causal_attention(q[part], k[part], v[part]))


def test_convolution_kernel_equals_causal_conv() -> None:
    kernel = pytest.importorskip("causal_conv1d")
    x, weight, bias = normal(BATCH, LENGTH, 64), normal(64, 4), normal(64)
    actual = kernel.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
    close(actual.transpose(1, 2), causal_conv(x, weight, bias))


@pytest.mark.parametrize("gated", [True, False], ids="gate={}".format)
def test_norm_kernel_equals_gated_rms_norm(gated: bool) -> None:
    kernel = pytest.importorskip("mamba_ssm.ops.triton.layernorm_gated")
    x, weight = normal(BATCH, LENGTH, 256), normal(256)
    gate = normal(BATCH, LENGTH, 256).roll(1) if gated else None
    actual = kernel.rmsnorm_fn(
        x, weight, None, z=gate, eps=1e-5, group_size=64, norm_before_gate=False
    )
    close(actual, gated_rms_norm(x, gate, weight, 1e-5, 64))
