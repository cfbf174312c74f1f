"""Our model section and their settings: each setting both ways, and what is refused, by name."""

from dataclasses import replace
from typing import Any

import pytest

from hybrid_train.nvidia import arguments
from hybrid_train.nvidia.arguments import FUNCTIONS, to_arguments, to_fields, to_model
from hybrid_train.schema.model import (
    Activation,
    Attention,
    Mamba,
    Mlp,
    Model,
    Moe,
    Mtp,
    NormKind,
    Rope,
    RopeScaling,
)
from hybrid_train.schema.problems import UserError
from tests.core_save import ARGUMENTS
from tests.tiny import EVERY_KIND, tiny_job

# None of them the default of either side, nor derived from another.
UNUSUAL = Model(
    pattern=EVERY_KIND,
    hidden_size=48,
    vocab_multiple=32,
    init_std=0.0173,
    tie_embeddings=True,
    attention=Attention(heads=6, kv_heads=3, head_dim=24),
    mamba=Mamba(heads=10, head_dim=8, state_size=24, groups=5, chunk_size=64),
    mlp=Mlp(intermediate_size=80),
    moe=Moe(
        experts=12, top_k=5, intermediate_size=56, shared_intermediate_size=40, latent_size=28,
        scaling_factor=5.0, bias_update_rate=0.01,
    ),
    mtp=Mtp(repeated_block=False),
)  # fmt: skip


# Transformers with all that the hybrids have not, in two kinds that exclude each other.
QWEN = replace(
    UNUSUAL, pattern="*-*-*", mamba=Mamba(), moe=Moe(), mtp=Mtp(),
    attention=Attention(
        heads=6, kv_heads=3, head_dim=24, qkv_bias=True, qk_norm=True,
        rope=Rope(theta=123_456.0, fraction=0.75),
    ),
    mlp=Mlp(intermediate_size=80, activation=Activation.silu, gated=True),
)  # fmt: skip
NEMOTRON = replace(
    QWEN, norm=NormKind.layer_1p, mlp=Mlp(intermediate_size=80),
    attention=Attention(heads=6, kv_heads=3, head_dim=24, rope=Rope(theta=0.5 + 10_000)),
)  # fmt: skip


@pytest.mark.parametrize("model", [UNUSUAL, QWEN, NEMOTRON], ids=["hybrid", "Qwen", "Nemotron"])
@pytest.mark.parametrize("write", [to_arguments, to_fields], ids=["arguments", "fields"])
def test_every_setting_comes_back(write: Any, model: Model) -> None:
    settings = write(model)
    if write is to_fields:  # which an export writes with the class of their config
        settings["activation_func"] = {"_target_": FUNCTIONS[model.mlp.activation][0]}
    assert to_model(settings, "here") == model


def test_arguments_of_a_llama_are_those_that_megatron_lm_is_started_with() -> None:
    llama = replace(QWEN, attention=Attention(rope=Rope(theta=1e6)))
    said = to_arguments(llama)
    wanted = {
        "position_embedding_type": "rope", "use_rotary_position_embeddings": True,
        "rotary_base": 1_000_000, "rotary_percent": 1.0, "swiglu": True, "squared_relu": False,
        "normalization": "RMSNorm", "apply_layernorm_1p": False, "add_qkv_bias": False,
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted
    assert type(said["rotary_base"]) is int, "which their parser asks for"


SCALED = Rope(theta=5e5, scaling=RopeScaling.llama3)


@pytest.mark.parametrize(
    ("write", "model", "said"),
    [
        (to_fields, replace(QWEN, attention=Attention(rope=SCALED)), "rope.scaling is llama3"),
        (to_arguments, replace(QWEN, mlp=Mlp(gated=True)), "squared_relu and model.mlp.gated true"),
        (to_arguments, replace(QWEN, mlp=Mlp(activation=Activation.silu)), "gated false"),
    ],
)
def test_what_theirs_cannot_say_is_refused_by_our_name(write: Any, model: Model, said: str) -> None:
    with pytest.raises(UserError, match=said):
        write(model)


@pytest.mark.parametrize("pattern", ["M", "M-", "*-M", "ME*E", "M/*E", "M/*/*/*", "M-/M"])
def test_layers_come_back_whatever_they_are(pattern: str) -> None:
    model = tiny_job(pattern).model
    model.init_std = 0.02
    found = to_model(to_arguments(model), "here")
    assert found.pattern == pattern
    assert to_model(to_arguments(found), "here") == found


def test_arguments_of_megatron_lm_are_our_tiny_model() -> None:
    expected = tiny_job().model
    expected.init_std, expected.mamba.chunk_size = 0.02, arguments.CHUNK
    assert to_model(ARGUMENTS, "here") == expected


def test_sizes_that_are_left_out_are_derived_as_megatron_core_derives_them() -> None:
    left_out = ("kv_channels", "ffn_hidden_size", "mamba_num_heads", "moe_ffn_hidden_size")
    settings = ARGUMENTS | dict.fromkeys(left_out) | {"group_query_attention": False}
    model = to_model(settings, "here")
    assert (model.attention.kv_heads, model.attention.head_dim) == (4, 32 // 4)
    assert (model.mlp.intermediate_size, model.moe.intermediate_size) == (128, 128)
    assert model.mamba.heads == 2 * 32 // 16


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ({"hybrid_override_pattern": "MEM*M-"}, "MEM*M-/*E/*E"),
        ({"hybrid_layer_pattern": "MEM*M-/*E"}, "MEM*M-/*E/*E"),  # one block serves two depths
        ({"hybrid_layer_pattern": "MEM*M-/*E/*E", "mtp_num_layers": None}, "MEM*M-/*E/*E"),
    ],
    ids=["former names", "repeated block", "pattern alone"],
)
def test_layers_of_mtp_are_read_in_each_way_they_were_said(
    names: dict[str, Any], pattern: str
) -> None:
    settings = ARGUMENTS | {"hybrid_layer_pattern": None, "mtp_hybrid_override_pattern": "*E"}
    assert to_model(settings | names, "here").pattern == pattern


REFUSED: dict[str, dict[str, Any]] = {
    "position_embedding_type is 'yarn'": {"position_embedding_type": "yarn"},
    "use_rope_scaling is True": {"position_embedding_type": "rope", "use_rope_scaling": True},
    "rotary_interleaved is True": {"position_embedding_type": "rope", "rotary_interleaved": True},
    "no_rope_freq is 4": {"position_embedding_type": "rope", "no_rope_freq": 4},
    "rotary_seq_len_interpolation_factor is 2": {
        "position_embedding_type": "rope", "rotary_seq_len_interpolation_factor": 2,
    },
    "rotary_base is '1e4'": {"position_embedding_type": "rope", "rotary_base": "1e4"},
    "rope.fraction = 0.4: turns 3 of the 8": {
        "position_embedding_type": "rope", "rotary_percent": 0.4,
    },
    "normalization is 'LayerNorm'": {"normalization": "LayerNorm"},
    "apply_layernorm_1p is True": {"apply_layernorm_1p": True},
    "add_bias_linear is True": {"add_bias_linear": True},
    "qk_norm = True: needs model.norm=rms": {
        "qk_layernorm": True, "normalization": "LayerNorm", "apply_layernorm_1p": True,
    },
    "swiglu is True": {"swiglu": True},
    "squared_relu is not set": {"squared_relu": False},
    "activation_func is torch.nn.functional.gelu": {
        "squared_relu": None, "activation_func": {"_target_": "torch.nn.functional.gelu"},
    },
    "window_size is": {"window_size": [128, 0]},
    "moe_router_score_function is 'softmax'": {"moe_router_score_function": "softmax"},
    "moe_router_num_groups is 4": {"moe_router_num_groups": 4},
    "moe_router_topk is 1; Megatron-Core does not normalise": {"moe_router_topk": 1},
    "layernorm_epsilon is 1e-06; Megatron-Core takes": {"norm_epsilon": 1e-6},
    "num_layers is 7, but the pattern has 6": {"num_layers": 7},
    "hybrid_layer_pattern is missing": {"hybrid_layer_pattern": None},
    "'G' is no kind of layer": {"hybrid_layer_pattern": "MEG*M-"},
    "hidden_size is missing": {"hidden_size": None},
    "hidden_size is '32'": {"hidden_size": "32"},
    "num_attention_heads is -4": {"num_attention_heads": -4},
    "init_method_std is nan": {"init_method_std": float("nan")},
    "mtp_num_layers is 1000": {"mtp_num_layers": 1000},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_models_here_lack_is_refused_by_its_name(said: str) -> None:
    with pytest.raises(UserError) as error:
        to_model(ARGUMENTS | REFUSED[said], "FOLDER")
    assert said in str(error.value)
    assert "FOLDER" in str(error.value)


def test_what_no_layer_of_the_model_has_is_not_asked_for() -> None:
    others = {"hybrid_layer_pattern": "MM", "num_layers": 2, "mtp_num_layers": None}
    others |= {"qk_layernorm": True, "moe_router_score_function": "softmax", "squared_relu": False}
    assert to_model(ARGUMENTS | others, "here").pattern == "MM"


def test_every_fault_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        to_model(ARGUMENTS | {"normalization": "LayerNorm", "hidden_size": None}, "here")
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(("rows", "size", "multiple"), [(64, 61, 16), (128, 61, 128), (64, 64, 16)])
def test_the_vocabulary_gets_as_many_rows_as_theirs(rows: int, size: int, multiple: int) -> None:
    from hybrid_train.planning.degrees import padded_vocab_size

    model = tiny_job().model
    arguments.vocabulary(model, rows, size)
    assert model.vocab_size == size
    assert model.vocab_multiple == multiple
    assert padded_vocab_size(size, model.vocab_multiple) == rows
