"""config.json: both ways, old spellings, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import NemotronHConfig

from hybrid_train.config.compose import compose
from hybrid_train.hf import config_json
from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError

PATH = Path("config.json")
NAMED = ["nemotron_h_8b", "nemotron_nano_v2_12b", "nemotron3_nano", "nemotron3_super", "tiny"]


def model_named(name: str) -> Model:
    return compose("count", [f"model={name}", "model.vocab_size=4096"]).model


def config_of(name: str) -> dict[str, Any]:
    return NEMOTRON_H.to_config(
        model_named(name),
        vocab_size=4096,
        length=8192,
        dtype="bfloat16",
        token_ids={"eos_token_id": 7},
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_model_comes_back_from_its_config(name: str) -> None:
    model = model_named(name)
    again = config_json.to_model(json.loads(json.dumps(config_of(name))), PATH)
    if model.init_std is None:
        model.init_std = again.init_std
    if "E" not in model.pattern:
        model.moe = again.moe
    if "-" not in model.pattern:
        model.mlp = again.mlp
    model.moe.bias_update_rate = again.moe.bias_update_rate  # a matter of training
    assert again == model


@pytest.mark.parametrize("name", NAMED)
def test_transformers_reads_the_same_sizes(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    theirs = NemotronHConfig.from_pretrained(tmp_path)
    model = model_named(name)
    assert theirs.hybrid_override_pattern == model.pattern.partition("/")[0]
    assert theirs.num_hidden_layers == len(theirs.hybrid_override_pattern)
    assert (
        theirs.mamba_num_heads * theirs.mamba_head_dim == model.mamba.heads * model.mamba.head_dim
    )
    assert (theirs.n_routed_experts, theirs.moe_latent_size) == (
        model.moe.experts,
        model.moe.latent_size,
    )
    assert theirs.head_dim == model.attention.head_dim
    assert theirs.eos_token_id == 7


@pytest.mark.parametrize(
    ("key", "older"),
    [
        ("head_dim", "attention_head_dim"),
        ("layer_norm_epsilon", "rms_norm_eps"),
        ("n_groups", "mamba_n_groups"),
        ("chunk_size", "mamba_chunk_size"),
        ("conv_kernel", "mamba_d_conv"),
    ],
)
def test_old_spellings_are_read(key: str, older: str) -> None:
    config = config_of("nemotron_nano_v2_12b")
    expected = config_json.to_model(config, PATH)
    config[older] = config.pop(key)
    assert config_json.to_model(config, PATH) == expected


@pytest.mark.parametrize("words", [("mamba", "attention"), ("linear_attention", "full_attention")])
def test_layers_are_read_as_words_of_either_kind(words: tuple[str, str]) -> None:
    config = config_of("tiny")
    del config["hybrid_override_pattern"], config["mtp_hybrid_override_pattern"]
    config["layers_block_type"] = [words[0], "moe", words[1], "mlp"]
    config["mtp_layers_block_type"] = [words[1], "moe"]
    assert config_json.to_model(config, PATH).pattern == "ME*-/*E"


def test_a_pattern_may_name_its_mtp_layers_itself() -> None:
    config = config_of("tiny") | {"hybrid_override_pattern": "ME*-/*E/*E"}
    assert config_json.to_model(config, PATH).pattern == "ME*-/*E/*E"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"n_group": 4}, "n_group is 4"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ({"time_step_limit": [0.01, 1.0]}, "time_step_limit is [0.01, 1.0]"),
        ({"hidden_size": "__import__('os')"}, "hidden_size is \"__import__('os')\""),
        ({"n_routed_experts": 10**12}, "n_routed_experts is 1000000000000"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but the pattern has 4"),
        ({"hybrid_override_pattern": "MX"}, "'X' is no kind of layer"),
        ({"hybrid_override_pattern": None}, "neither layers_block_type nor"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers is 1000000000"),
        ({"layers_block_type": ["moe", "rwkv"]}, "layers_block_type has other words"),
        ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon is inf"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"num_key_value_heads": 0}, "attention.kv_heads = 0: must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide"),
        ({"n_groups": 3}, "n_groups is 3; it must divide the number of heads, 8"),
        ({"num_experts_per_tok": 9}, "moe.top_k = 9: must not exceed experts (4)"),
    ],
)
def test_what_is_no_model_of_the_family_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_json.to_model(config_of("tiny") | changes, PATH)
    assert message in str(error.value)


def test_sizes_of_layers_that_a_model_lacks_may_be_anything() -> None:
    none = {"num_attention_heads": 0, "n_routed_experts": 0, "moe_intermediate_size": 0}
    config = config_of("nemotron_h_8b") | none | {"hybrid_override_pattern": "M-"}
    config |= {"num_hidden_layers": 2}
    assert config_json.to_model(config, PATH).pattern == "M-"


def test_key_value_heads_that_are_left_to_the_heads_are_as_many() -> None:
    config = config_of("tiny") | {"num_key_value_heads": None}
    assert config_json.to_model(config, PATH).attention.kv_heads == 4


@pytest.mark.parametrize("name", NAMED)
def test_a_new_config_is_strict_json_and_has_no_limit_of_steps(name: str, tmp_path: Path) -> None:
    json.dumps(config_of(name), allow_nan=False)
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    assert tuple(NemotronHConfig.from_pretrained(tmp_path).time_step_limit) == (0.0, math.inf)


def test_a_config_that_is_renewed_keeps_what_describes_no_computation() -> None:
    older = {"attention_head_dim": 3, "layers_block_type": ["moe"], "mtp_num_layers": 7}
    said = {
        "model_type": "nemotron_h",
        "auth": {"by": "a lab"},
        "eos_token_id": [2, 5],
        "torch_dtype": "float16",
    } | older
    made = config_of("nemotron_h_8b")
    renewed = config_json.renewed(said, made, model_named("nemotron_h_8b"))
    assert {key: renewed[key] for key in ("auth", "eos_token_id", "torch_dtype")} == {
        "auth": {"by": "a lab"}, "eos_token_id": [2, 5], "torch_dtype": "float16",
    }  # fmt: skip
    assert not older.keys() & renewed.keys()
    assert config_json.to_model(renewed, PATH) == config_json.to_model(made, PATH)


def test_changes_are_those_that_decide_logits() -> None:
    before, now = model_named("tiny"), model_named("tiny")
    now.init_std, now.moe.bias_update_rate, now.vocab_multiple = 0.5, 0.0, 16
    assert config_json.changes(before, now) == []
    now.moe.top_k, now.norm_eps = 1, 1e-3
    assert config_json.changes(before, now) == ["norm_eps", "moe.top_k"]
    before.pattern = now.pattern = "M-"
    assert config_json.changes(before, now) == ["norm_eps"]


def test_a_model_without_a_shared_expert_is_not_exported() -> None:
    model = model_named("tiny")
    model.moe = dataclasses.replace(model.moe, shared_intermediate_size=None)
    with pytest.raises(UserError, match="always has a shared expert"):
        config_json.family_for(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[1]", "model_type is None"), ('{"model_type": "gemma"}', "'gemma'")],
)
def test_a_file_of_another_kind_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        config_json.read_config(tmp_path)
