"""Edits for tests: fixed masks on the weights of every linear layer; a frozen embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid_train.runtime import ranks
from hybrid_train.schema.extension import EditSettings
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.tiny import BATCH, LENGTH, VOCAB, tiny_job, tiny_model

NVFP4 = Precision(format=GemmFormat.nvfp4)
# One of each: split by columns, by rows, whole on every rank, of experts.
KINDS = {"mlp.fc1", "mlp.fc2", "moe.latent.down", "moe.experts.fc1"}


def mask_of(weight: Tensor, number: int) -> Tensor:
    """Rows that stay, [O, 1]: about three of four, others in each weight."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(len(weight), 1, generator=generator) < 0.75


class Masks:
    """Masks output neurons of every linear layer."""

    def apply(self, chunks: Sequence[nn.Module]) -> None:
        from hybrid_train.model.edits import add_transform, linears_of

        for number, (linear, module) in enumerate(linears_of(chunks)):
            add_transform(linear, module, _transform(number))

    @property
    def stage(self) -> Any:
        from hybrid_train.model.edits import Stage

        return Stage.mask


@dataclass(kw_only=True)
class FreezeEmbedding(EditSettings):
    """Settings of `FrozenEmbedding`."""

    implementation: ClassVar[str] = "tests.masking:FrozenEmbedding"
    kind: str = "tests.masking:FreezeEmbedding"


class FrozenEmbedding:
    """Takes the embedding out of training."""

    def __init__(self, _: FreezeEmbedding) -> None:
        from hybrid_train.model.edits import Stage

        self.stage = Stage.freeze

    def apply(self, chunks: Sequence[nn.Module]) -> None:
        for chunk in chunks:
            chunk.get_parameter("embedding.word_embeddings.weight").requires_grad_(False)


def _transform(number: int) -> Any:
    from hybrid_train.model.edits import OperandTransform

    class Mask(OperandTransform):
        def weight(self, weight: Tensor, expert: int) -> Tensor:
            return weight * mask_of(weight, number + 100 * expert)

    return Mask()


def model_with(groups: Any, edits: Sequence[Any], parallel: Any = None) -> Any:
    """A tiny model in float32 with these edits; always the same weights."""
    from hybrid_train.model.edits import apply_edits

    job = tiny_job("M*-E")
    if parallel is not None:
        job.parallel = parallel
    model = tiny_model(job, groups)
    apply_edits(edits, [model])
    return model


def quantized(groups: Any) -> Any:
    """The edit that quantizes every product to NVFP4, gradients by stochastic rounding."""
    from hybrid_train.model.quantized import QuantizedGemms

    edit = QuantizedGemms(tiny_job("M*-E").model, NVFP4, 1, groups.tp_dp_cp)
    edit.start_step(0)
    return edit


def through(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What the layers make of some input, and the gradient of every parameter."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    hidden = model.decoder(hidden_states=model.embedding(tokens, None), attention_mask=None)
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden * weights).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {name: p.grad for name, p in named if p.grad is not None}


def linears(model: Any) -> list[tuple[int, str, nn.Module]]:
    """Number, kind and module of every linear layer."""
    from hybrid_train.megatron.plain import linear_modules

    return [(n, linear.module, one) for n, (linear, one) in enumerate(linear_modules(model))]


def masked_by_hand(model: Any) -> dict[str, Tensor]:
    """Set the masked rows of a model's weights to zero; return the masks by name."""
    masks = {}
    names = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        for number, _, module in linears(model):
            weights = [p for name, p in module.named_parameters() if name.startswith("weight")]
            for expert, weight in enumerate(weights):
                mask = mask_of(weight, number + 100 * expert)
                masks[names[id(weight)]] = mask
                weight.mul_(mask)
    return masks


def compare(groups: Any, parallel: Any = None, *, quantizes: bool = True) -> None:
    """Masks as an edit, before quantization, against weights whose rows were set to zero."""
    # The wrong way round, which must not matter.
    edits = [quantized(groups), Masks()] if quantizes else [Masks()]
    edited = model_with(groups, edits, parallel)
    by_hand = model_with(groups, [quantized(groups)] if quantizes else [], parallel)
    untouched = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    masks = masked_by_hand(by_hand)
    found, gradients = through(edited)
    expected, wanted = through(by_hand)
    exact = {"rtol": 0, "atol": 0} if quantizes else {}  # fused experts sum in another order
    torch.testing.assert_close(found, expected, **exact)
    assert gradients.keys() == wanted.keys()
    assert len(masks) > len(KINDS)
    for name, gradient in wanted.items():
        mask = masks.get(name)
        left = gradient if mask is None else gradient * mask
        torch.testing.assert_close(gradients[name], left, **exact, msg=name)
    for name, parameter in edited.named_parameters():
        assert torch.equal(parameter, untouched[name]), name  # nothing is cut off
    assert edited.state_dict().keys() == by_hand.state_dict().keys()


@dataclass(kw_only=True)
class FailOnOneRank(EditSettings):
    """Settings of `FailingLayer`."""

    implementation: ClassVar[str] = "tests.masking:FailingLayer"
    kind: str = "tests.masking:FailOnOneRank"


class FailingLayer:
    """Lets the last layer of rank 1 fail, whose output others wait for."""

    def __init__(self, _: FailOnOneRank) -> None:
        pass

    def apply(self, chunks: Sequence[nn.Module]) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("a layer that fails")

        if ranks.rank() == 1:
            layers: Any = chunks[0].decoder.layers  # type: ignore[union-attr]
            layers[len(layers) - 1].register_forward_hook(fail)

    @property
    def stage(self) -> Any:
        from hybrid_train.model.edits import Stage

        return Stage.mask
