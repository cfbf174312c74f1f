"""The whole mixer against transformers' PyTorch path, and the entry points that Megatron calls."""

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from hybrid_train.ops.mixer import (
    mamba_split_conv1d_scan_combined,
    mixer_forward,
)
from hybrid_train.ops.norm import gated_rms_norm
from tests.packed import index_of, spans

HEADS, WIDTH, GROUPS, STATE, HIDDEN = 4, 3, 2, 5, 8
INNER = HEADS * WIDTH
CONV = INNER + 2 * GROUPS * STATE


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "packed": normal(2, 7, INNER + CONV + HEADS),
        "conv_weight": normal(CONV, 4),
        "conv_bias": normal(CONV),
        "dt_bias": normal(HEADS),
        "a": -normal(HEADS).exp(),
        "d": normal(HEADS),
    }


def run(inputs: dict[str, Tensor], chunk: int = 4) -> Tensor:
    return mixer_forward(**inputs, head_width=WIDTH, groups=GROUPS, chunk=chunk)


def megatron_call(inputs: dict[str, Tensor], **changes: object) -> Tensor:
    """Call with the keywords of MambaMixer._ssm_training in megatron-core 0.19.2."""
    packed, weight, bias, dt_bias, a, d = inputs.values()
    keywords: dict[str, object] = {
        "D": d,
        "chunk_size": 4,
        "activation": "silu",
        "headdim": WIDTH,
        "ngroups": GROUPS,
        "norm_before_gate": False,
        "seq_idx": None,
    }
    return mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, a, **{**keywords, **changes}
    )  # type: ignore[arg-type]


def test_mixer_and_norm_equal_the_mixer_of_transformers() -> None:
    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=HIDDEN,
        mamba_num_heads=HEADS,
        mamba_head_dim=WIDTH,
        n_groups=GROUPS,
        ssm_state_size=STATE,
        conv_kernel=4,
        chunk_size=4,
        layers_block_type=["mamba"],
        time_step_min=0.0,  # its lower limit of dt, which the family does not have
    )
    theirs = NemotronHMamba2Mixer(config, layer_idx=0)
    for name, parameter in theirs.named_parameters():
        if name in ("D", "dt_bias", "norm.weight"):
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, HIDDEN)
    y = mixer_forward(
        theirs.in_proj(x),
        theirs.conv1d.weight.squeeze(1),
        theirs.conv1d.bias,
        theirs.dt_bias,
        -theirs.A_log.exp(),
        theirs.D,
        head_width=WIDTH,
        groups=GROUPS,
        chunk=4,
    )
    normed = gated_rms_norm(y, None, theirs.norm.weight, config.layer_norm_epsilon, INNER // GROUPS)
    ours = theirs.out_proj(normed)
    expected = theirs(x)
    torch.testing.assert_close(ours, expected)
    weights = list(theirs.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
    )


def test_mixer_passes_gradcheck() -> None:
    inputs = parameters()
    inputs["packed"] = inputs["packed"][:1, :3]
    names = list(inputs)
    tensors = tuple(t.clone().requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(
        lambda *given: run(dict(zip(names, given, strict=True)), chunk=2), tensors
    )


@pytest.mark.parametrize("chunk", [1, 3, 128], ids="chunk={}".format)
def test_the_chunk_does_not_change_the_result(chunk: int) -> None:
    torch.testing.assert_close(run(parameters(), chunk), run(parameters()))


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = {n: t.requires_grad_() for n, t in parameters(torch.bfloat16).items()}
    y = run(inputs)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.bfloat16 for t in inputs.values())
    expected = run({n: t.detach().float() for n, t in inputs.items()})
    # Rounded after the convolution, after the scan and at the end, each to 8 bits.
    torch.testing.assert_close(
        y.float(), expected, rtol=0, atol=2**-5 * float(expected.abs().max())
    )


def test_the_name_that_megatron_calls_in_training_gates_and_does_not_normalise() -> None:
    torch.testing.assert_close(megatron_call(parameters()), run(parameters()))


def test_the_name_that_megatron_calls_in_training_keeps_documents_apart() -> None:
    inputs, index = parameters(), index_of([3, 4], [6, 1])
    found = megatron_call(inputs, seq_idx=index)
    for row, start, end in spans(index):
        alone = {**inputs, "packed": inputs["packed"][row : row + 1, start:end]}
        torch.testing.assert_close(found[row : row + 1, start:end], run(alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rmsnorm_weight": torch.ones(INNER)}, "rmsnorm_weight not covered"),
        ({"dt_limit": (0.0, 1.0)}, "dt_limit not covered"),
        ({"headdim": None}, "one weight per channel"),
        ({"activation": "relu"}, "only 'silu' is covered"),
    ],
    ids=["norm", "limit", "channels", "activation"],
)
def test_arguments_that_are_not_covered_are_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        megatron_call(parameters(), **change)
