"""Plain layers against formulas, and their names in checkpoints."""

from typing import Any

import pytest
import torch

from tests.tiny import MEGATRON_WARNINGS, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module")
def config(groups: Any) -> Any:
    from hybrid_train.megatron.transformer_config import transformer_config

    return transformer_config(tiny_job("*E"), on_gpu=False)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [9, 0, 0, 0]])
def test_grouped_experts_equal_a_loop_over_experts(
    config: Any, groups: Any, counts: list[int]
) -> None:
    from hybrid_train.megatron.plain import Experts

    experts = Experts(4, config, pg_collection=groups)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    tokens, probs = torch.randn(9, 16), torch.rand(9)
    expected = []
    start = 0
    for e, count in enumerate(counts):
        up = getattr(experts.linear_fc1, f"weight{e}")
        down = getattr(experts.linear_fc2, f"weight{e}")
        mine = slice(start, start + count)
        inner = torch.relu(tokens[mine] @ up.T) ** 2
        expected.append((inner * probs[mine, None]) @ down.T)
        start += count
    found, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-4)


def test_norm_and_linear_in_one_equal_both_by_themselves(groups: Any) -> None:
    model = tiny_model(tiny_job("*"), groups)
    linear = model.decoder.layers[0].self_attention.linear_qkv
    torch.nn.init.uniform_(linear.layer_norm_weight, 0.5, 1.5)
    x = torch.randn(5, 2, 32)
    normed = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * linear.layer_norm_weight
    found, bias = linear(x)
    assert bias is None
    torch.testing.assert_close(found, normed @ linear.weight.T)


LAYERS = {
    "M": [
        "mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "mixer.out_proj.weight",
        "mixer.in_proj.layer_norm_weight",
        *(f"mixer.in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")),
        *(f"mixer.conv1d.{leaf}.{part}" for leaf in ("weight", "bias") for part in ("x", "B", "C")),
    ],
    "*": [
        "self_attention.linear_qkv.weight", "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_proj.weight",
    ],
    "-": ["mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.weight"],
    "E": [
        "pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.expert_bias",
        "mlp.fc1_latent_proj.weight", "mlp.fc2_latent_proj.weight",
        "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight",
        "mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight",
    ],
}  # fmt: skip


def stored_keys(model: Any) -> set[str]:
    """Names under which a checkpoint stores the tensors of a model."""
    from hybrid_train.megatron.checkpoints import sharded_tensors

    return {shard.key for shard in sharded_tensors(model)}


@pytest.mark.parametrize("letter", LAYERS)
def test_checkpoints_store_a_layer_under_the_names_of_transformer_engine(
    groups: Any, letter: str
) -> None:
    """Names as Megatron writes them on a GPU with its TE spec, core 0.19.2."""
    keys = stored_keys(tiny_model(tiny_job(letter), groups))
    outside = {"embedding.word_embeddings.weight", "output_layer.weight"}
    layer = {key.removeprefix("decoder.layers.0.") for key in keys if "layers.0." in key}
    assert layer == set(LAYERS[letter])
    assert outside <= keys
