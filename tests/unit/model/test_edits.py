"""Several edits of one linear layer: its operands are masked, and what is left is quantized."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_train.anatomy.gemm_formats import Linear
from hybrid_train.schema.problems import UserError
from tests.masking import (
    KINDS,
    Masks,
    compare,
    linears,
    mask_of,
    masked_by_hand,
    model_with,
    quantized,
    through,
)
from tests.tiny import MEGATRON_WARNINGS, VOCAB, microbatches, some_rows, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize("quantizes", [True, False], ids=["quantized", "not quantized"])
def test_a_mask_before_quantization_is_a_model_whose_weights_are_masked(
    groups: Any, quantizes: bool
) -> None:
    compare(groups, quantizes=quantizes)


def test_gradients_pass_the_mask_on_their_way_into_the_buffer_of_data_parallelism(
    groups: Any,
) -> None:
    """In a whole step, where an unmasked weight adds its gradient to the buffer directly."""
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model
    from hybrid_train.model.edits import apply_edits

    job = tiny_job("M*-E")
    job.optimizer.clip_grad_norm = 0.0
    buffers = []
    for edits in ([Masks()], []):
        built = build_model(job, groups, VOCAB, on_gpu=False)
        apply_edits(edits, built.chunks)
        masks = {} if edits else masked_by_hand(built.chunks[0])
        engine = build_engine(job, built, groups, torch.device("cpu"))
        engine.step(microbatches(some_rows(), 2), tokens_seen=0)
        named = engine.network.chunks[0].module.named_parameters()
        buffers.append({name: weight.main_grad.clone() for name, weight in named})
    edited, by_hand = buffers
    for name, gradient in by_hand.items():
        expected = gradient * masks.get(name, 1)
        torch.testing.assert_close(edited[name], expected, msg=name)


def test_each_kind_of_layer_multiplies_the_quantized_masked_weight(groups: Any) -> None:
    from hybrid_train.model.edits import edits_of
    from hybrid_train.precision.operands import quantize_dequantize
    from hybrid_train.precision.recipes import OPERANDS, Operand
    from hybrid_train.schema.precision import Gemm

    model = model_with(groups, [Masks(), quantized(groups)])
    seen = set()
    axes = dict(OPERANDS[Gemm.fprop])
    for number, kind, module in linears(model):
        if kind not in KINDS:
            continue
        seen.add(kind)
        edited = edits_of(module)
        assert edited is not None
        weights = [p for name, p in module.named_parameters() if name.startswith("weight")]
        x = torch.randn(8, weights[0].shape[1])
        for expert, weight in enumerate(weights):
            operands = []
            how = edited.emulations[expert]
            masked = weight.detach() * mask_of(weight, number + 100 * expert)
            for operand, value in ((Operand.input, x), (Operand.weight, masked)):
                scheme = how.scheme(Gemm.fprop, operand)
                assert scheme is not None
                operands.append(quantize_dequantize(value, scheme, axes[operand]))
            counts = [0] * len(weights)
            counts[expert] = len(x)
            y = _called(module, x, counts)
            torch.testing.assert_close(y, operands[0] @ operands[1].T)
            assert (y[:, ~mask_of(weight, number + 100 * expert)[:, 0]] == 0).all()
    assert seen == KINDS


def _called(module: Any, x: Tensor, counts: list[int]) -> Tensor:
    if len(counts) > 1:  # experts are multiplied where both projections are at hand
        found: Tensor = module.edited.multiply_grouped(x, module(), counts)
        return found
    if not hasattr(module, "_forward_impl"):
        return module(x)[0]  # type: ignore[no-any-return]
    y: Tensor = module._forward_impl(  # what core calls, behind the norm of some
        *(x, module.weight),
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=None,
    )
    return y


def test_without_edits_a_layer_is_as_it_was_built(groups: Any) -> None:
    from hybrid_train.model.edits import quantize

    plain = model_with(groups, [])
    edit = quantized(groups)
    undone = model_with(groups, [edit])
    assert not torch.equal(through(plain)[0], through(undone)[0])
    for _, _, module in linears(undone):
        quantize(module, ())
        assert "_forward_impl" not in vars(module)
    (expected, wanted), (found, gradients) = through(plain), through(undone)
    assert torch.equal(found, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())


def test_another_phase_leaves_the_masks_where_they_are(groups: Any) -> None:
    from hybrid_train.model.edits import edits_of, quantize

    model = model_with(groups, [Masks(), quantized(groups)])
    masked = model_with(groups, [Masks()])
    for _, _, module in linears(model):
        quantize(module, ())
        assert edits_of(module) is not None
    assert torch.equal(through(model)[0], through(masked)[0])


def test_edits_act_in_the_order_of_their_stages() -> None:
    from hybrid_train.model.edits import Stage, apply_edits

    acted: list[Stage] = []

    class Noted:
        def __init__(self, stage: Stage) -> None:
            self.stage = stage

        def apply(self, _: Sequence[nn.Module]) -> None:
            acted.append(self.stage)

    apply_edits([Noted(stage) for stage in reversed(Stage)], [])
    assert acted == [Stage.permute, Stage.mask, Stage.quantize, Stage.freeze]


def test_transforms_of_an_input_and_of_one_stage_act_in_turn(groups: Any) -> None:
    from hybrid_train.model.edits import OperandTransform, add_transform

    class Scaled(OperandTransform):
        def __init__(self, factor: float, offset: float) -> None:
            self.factor, self.offset = factor, offset

        def input(self, x: Tensor) -> Tensor:
            return x * self.factor + self.offset

    model = model_with(groups, [])
    module = next(one for _, kind, one in linears(model) if kind == "moe.latent.down")
    for transform in (Scaled(2, 1), Scaled(3, 5)):
        add_transform(Linear(0, 4, "moe.latent.down"), module, transform)
    x = torch.randn(4, module.weight.shape[1])
    expected = (3 * (2 * x + 1) + 5) @ module.weight.T
    torch.testing.assert_close(module(x)[0], expected)


def test_a_linear_of_transformer_engine_is_refused_by_name() -> None:
    from hybrid_train.model.edits import OperandTransform, add_transform

    native: Any = SimpleNamespace(te_quant_params=None)
    with pytest.raises(UserError, match=r"mlp\.fc1 of layer 3 is a linear of Transformer Engine"):
        add_transform(Linear(0, 3, "mlp.fc1"), native, OperandTransform())
