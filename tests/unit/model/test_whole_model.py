"""The whole model against NemotronH of transformers, which nobody here wrote."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

from hybrid_train.config.schema.model import Model
from tests.tiny import LENGTH, MEGATRON_WARNINGS, some_rows, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS
LAYER_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


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
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return NemotronHForCausalLM(config).eval()


def their_weights(ours: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Our weights under their names."""
    theirs = {
        "model.embeddings.weight": ours["embedding.word_embeddings.weight"],
        "model.norm_f.weight": ours["decoder.final_norm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    of_layer = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}
    for number, letter in enumerate(model.pattern):
        prefix = f"decoder.layers.{number}."
        layer = {k.removeprefix(prefix): v for k, v in ours.items() if k.startswith(prefix)}
        for name, weight in of_layer[letter](layer, model).items():
            theirs[f"model.layers.{number}.{name}"] = weight
    return theirs


def _mamba(ours: dict[str, Tensor], _: Model) -> dict[str, Tensor]:
    same = ("in_proj.weight", "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")
    return {
        "norm.weight": ours["mixer.in_proj.layer_norm_weight"],
        "mixer.conv1d.weight": ours["mixer.conv1d_weight"],
        "mixer.conv1d.bias": ours["mixer.conv1d_bias"],
        **{f"mixer.{name}": ours[f"mixer.{name}"] for name in same},
    }


def _attention(ours: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Each key-value group holds its queries, then its key, then its value."""
    sizes = model.attention
    queries = sizes.heads // sizes.kv_heads
    packed = ours["self_attention.linear_qkv.weight"].view(
        sizes.kv_heads, queries + 2, sizes.head_dim, -1
    )
    q, k, v = packed.split([queries, 1, 1], dim=1)
    return {
        "norm.weight": ours["self_attention.linear_qkv.layer_norm_weight"],
        "mixer.q_proj.weight": q.flatten(0, 2),
        "mixer.k_proj.weight": k.flatten(0, 2),
        "mixer.v_proj.weight": v.flatten(0, 2),
        "mixer.o_proj.weight": ours["self_attention.linear_proj.weight"],
    }


def _mlp(ours: dict[str, Tensor], _: Model) -> dict[str, Tensor]:
    return {
        "norm.weight": ours["mlp.linear_fc1.layer_norm_weight"],
        "mixer.up_proj.weight": ours["mlp.linear_fc1.weight"],
        "mixer.down_proj.weight": ours["mlp.linear_fc2.weight"],
    }


def _moe(ours: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    def stacked(linear: str) -> Tensor:
        weights = [ours[f"mlp.experts.{linear}.weight{e}"] for e in range(model.moe.experts)]
        return torch.stack(weights)

    theirs = {
        "norm.weight": ours["pre_mlp_layernorm.weight"],
        "mixer.gate.weight": ours["mlp.router.weight"],
        "mixer.gate.e_score_correction_bias": ours["mlp.router.expert_bias"],
        "mixer.experts.up_proj": stacked("linear_fc1"),
        "mixer.experts.down_proj": stacked("linear_fc2"),
        "mixer.shared_experts.up_proj.weight": ours["mlp.shared_experts.linear_fc1.weight"],
        "mixer.shared_experts.down_proj.weight": ours["mlp.shared_experts.linear_fc2.weight"],
    }
    if model.moe.latent_size is not None:
        for name in ("fc1_latent_proj.weight", "fc2_latent_proj.weight"):
            theirs[f"mixer.{name}"] = ours[f"mlp.{name}"]
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
    state = {k: v for k, v in ours.state_dict().items() if isinstance(v, Tensor)}
    theirs = their_model(job.model, len(state["output_layer.weight"]))
    theirs.load_state_dict(their_weights(state, job.model), strict=True)

    tokens = some_rows(3)[:, :LENGTH]
    with torch.no_grad():
        actual, in_float32 = ours(tokens), theirs(tokens, use_cache=False).logits
        exact = theirs.double()(tokens, use_cache=False).logits
    # What float32 costs this very model is measured on their side. Our order of sums is another,
    # so our roundings are others of the same size; the maximum of as many of them varies little.
    rounding = (in_float32 - exact).abs().max().item()
    torch.testing.assert_close(actual, exact, rtol=0, atol=3 * rounding)
    assert rounding < 1e-5 * exact.std()  # so that the line above says something
