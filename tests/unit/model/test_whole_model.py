"""The whole model against NemotronH of transformers, which nobody here wrote."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

from hybrid_train.data.batch import Batch
from hybrid_train.hf.families.nemotron_h import LAYER_TYPES, NEMOTRON_H
from hybrid_train.hf.tensors import turn_round
from hybrid_train.schema.model import Model
from tests.tiny import (
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    losses_of,
    some_rows,
    tiny_job,
    tiny_model,
)

pytestmark = MEGATRON_WARNINGS


def their_model(model: Model, vocab_size: int) -> NemotronHForCausalLM:
    config = NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        layers_block_type=[LAYER_TYPES[letter] for letter in model.pattern],
        num_attention_heads=model.attention.heads,
        num_key_value_heads=model.attention.kv_heads,
        head_dim=model.attention.head_dim,
        intermediate_size=model.mlp.intermediate_size,
        ssm_state_size=model.mamba.state_size,
        mamba_num_heads=model.mamba.heads,
        mamba_head_dim=model.mamba.head_dim,
        n_groups=model.mamba.groups,
        chunk_size=5,  # another than ours: it must not matter
        time_step_min=1e-30,  # a lower limit of dt that the family does not have
        n_routed_experts=model.moe.experts,
        num_experts_per_tok=model.moe.top_k,
        moe_intermediate_size=model.moe.intermediate_size,
        moe_shared_expert_intermediate_size=model.moe.shared_intermediate_size,
        moe_latent_size=model.moe.latent_size,
        routed_scaling_factor=model.moe.scaling_factor,
        layer_norm_epsilon=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return NemotronHForCausalLM(config).eval()


def their_weights(ours: Any, groups: Any, model: Model) -> dict[str, Tensor]:
    """Our weights under their names, by the table that conversions use."""
    from hybrid_train.checkpoint.shards import shards_of

    stored: dict[str, Tensor] = {}
    for shard in shards_of([ours], groups):
        weight = shard.weight
        whole = stored.setdefault(weight.key, torch.empty(weight.global_shape))
        numbered = weight.prepend_axis_num  # the place of an expert on the first axis
        whole[weight.global_offset[:numbered]] = weight.data.detach()
    theirs = {}
    for one in turn_round(NEMOTRON_H.table(model, VOCAB)).values():
        pieces = [stored[piece.key][piece.start : piece.stop] for piece in one.pieces.values()]
        name = one.name.replace("backbone.", "model.")
        theirs[name] = torch.cat(pieces).view(one.shape)
    return _stacked(theirs, model.moe.experts)


def their_gradients(ours: Any, groups: Any, model: Model) -> dict[str, Tensor]:
    """Our gradients under their names; the weights are gone afterwards."""
    for weight in ours.parameters():
        weight.data = weight.grad
    return their_weights(ours, groups, model)


def _stacked(theirs: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Stack the experts of a layer, as the class holds them."""
    first = ".experts.0."
    for name in [name for name in theirs if first in name]:
        names = [name.replace(first, f".experts.{expert}.") for expert in range(experts)]
        whole = torch.stack([theirs.pop(one) for one in names])
        theirs[name.replace(first, ".experts.").removesuffix(".weight")] = whole
    return theirs


@torch.no_grad()
def _leave_initial_values(model: torch.nn.Module) -> None:
    """Move norms off 1 and expert biases off 0, and let no layer be a faint echo of its input."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or name.endswith("mixer.D"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("expert_bias"):
            tensor.uniform_(-0.2, 0.2)  # scores lie in 0 to 1: some choices change
        elif tensor.dim() == 2 and "router" not in name:
            tensor.mul_(3)


@pytest.mark.parametrize(
    ("pattern", "latent"),
    [("M", None), ("*", None), ("-", None), ("E", None), ("E", 16), ("MEM*M-ME*E", 16)],
)
def test_logits_equal_those_of_transformers(groups: Any, pattern: str, latent: int | None) -> None:
    job = tiny_job(pattern)
    job.model.moe.latent_size = latent
    ours = tiny_model(job, groups).eval()
    _leave_initial_values(ours)
    weights = their_weights(ours, groups, job.model)
    theirs = their_model(job.model, VOCAB)
    theirs.load_state_dict(weights, strict=True)

    tokens = some_rows(3)[:, :LENGTH]
    with torch.no_grad():
        actual = ours(tokens).logits()[..., :VOCAB]
        in_float32 = theirs(tokens, use_cache=False).logits
        exact = theirs.double()(tokens, use_cache=False).logits
    # What float32 costs this very model is measured on their side. Our order of sums is another,
    # so our roundings are others of the same size; the maximum of as many of them varies little.
    rounding = (in_float32 - exact).abs().max().item()
    torch.testing.assert_close(actual, exact, rtol=0, atol=3 * rounding)
    assert rounding < 1e-5 * exact.std()  # so that the line above says something


@pytest.mark.parametrize(
    ("pattern", "top_k", "tied"),
    [("M*-", 2, False), ("ME*E", 1, False), ("ME*E", 4, True)],
)
def test_loss_and_gradients_equal_those_of_transformers(
    groups: Any, pattern: str, top_k: int, tied: bool
) -> None:
    """61 tokens in 64 rows, and the weight of a single expert is 1, whatever its score."""
    job = tiny_job(pattern)
    job.model.moe.top_k, job.model.tie_embeddings = top_k, tied
    job.objective.moe_aux_loss_scale = 0.0  # theirs has none
    ours = tiny_model(job, groups)
    _leave_initial_values(ours)
    theirs = their_model(job.model, VOCAB)
    if tied:  # their class never ties the two, whatever its config says (_tied_weights_keys)
        theirs.lm_head.weight = theirs.model.embeddings.weight
    theirs.load_state_dict(their_weights(ours, groups, job.model), strict=not tied)
    batch = batch_of(some_rows(3))
    total, losses = losses_of(ours, batch)
    (total / losses.numel()).backward()
    in_float32 = loss_and_gradients(theirs, batch)
    expected, exact = loss_and_gradients(theirs.double(), batch)

    torch.testing.assert_close(losses.mean(), expected.float(), rtol=1e-6, atol=0)
    found = their_gradients(ours, groups, job.model)
    largest = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        # As for the logits. Where a gradient is zero, as that of a router that chooses one expert,
        # what is left of it is measured by the others.
        rounding = (in_float32[1][name] - gradient).norm()
        apart = (found[name] - gradient).norm()
        assert apart <= 4 * rounding + 1e-7 * largest, name
        assert rounding < 1e-4 * max(gradient.norm(), 1e-3 * largest), name


def loss_and_gradients(theirs: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Their loss and gradients, the latter as float64."""
    theirs.zero_grad()
    logits = theirs(batch.tokens, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    gradients = {name: weight.grad.double() for name, weight in theirs.named_parameters()}
    return loss.detach(), gradients
