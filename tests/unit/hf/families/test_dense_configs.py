"""config.json of dense families: defaults of the classes, old spellings, refusals, the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hybrid_train.hf import config_json
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import open_checkpoint
from hybrid_train.schema.model import Activation, NormKind
from hybrid_train.schema.problems import UserError
from tests.dense_folders import CLASSES, FAMILIES, folder_of
from tests.hf_folders import read_files, write_files

PATH = Path("config.json")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config of the defaults of a class, with the window of mistral switched off."""
    off = {"sliding_window": None} if family == "mistral" else {}
    return {"model_type": family, **off, **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_the_class_takes(family: str) -> None:
    model = config_json.to_model(config_of(family), PATH)
    theirs = getattr(transformers, f"{CLASSES[family]}Config")(**config_of(family))
    attention = model.attention
    hidden = theirs.hidden_size // theirs.num_attention_heads
    assert (model.vocab_size, model.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert model.pattern == "*-" * theirs.num_hidden_layers
    assert attention.heads == theirs.num_attention_heads
    # NemotronConfig of transformers 5.23 leaves null what its class cannot compute then.
    assert attention.kv_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
    assert attention.head_dim == getattr(theirs, "head_dim", hidden)
    assert model.mlp.intermediate_size == theirs.intermediate_size
    assert model.init_std == theirs.initializer_range
    assert model.norm_eps == (theirs.norm_eps if family == "nemotron" else theirs.rms_norm_eps)
    assert model.tie_embeddings == theirs.tie_word_embeddings
    assert attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert attention.rope.fraction == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert config_json.family_of(config_of(family)).length == theirs.max_position_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_fixes_is_in_the_model(family: str) -> None:
    model = config_json.to_model(config_of(family), PATH)
    is_nemotron = family == "nemotron"
    assert model.norm is (NormKind.layer_1p if is_nemotron else NormKind.rms)
    assert model.mlp.gated is not is_nemotron
    assert model.mlp.activation is (Activation.squared_relu if is_nemotron else Activation.silu)
    assert model.attention.qkv_bias == (family == "qwen2")
    assert model.attention.qk_norm == (family == "qwen3")


def test_old_names_of_the_width_of_a_head_are_read() -> None:
    """Nemotron-Mini-4B has kv_channels alone; Minitron-8B heads that do not make up the hidden."""
    config = config_of("nemotron", hidden_size=3072, num_attention_heads=24, kv_channels=96)
    assert config_json.to_model(config, PATH).attention.head_dim == 96
    del config["kv_channels"]
    assert config_json.to_model(config, PATH).attention.head_dim == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_key_value_heads_that_are_null_are_as_many_as_the_heads(family: str) -> None:
    config = config_of(family, num_key_value_heads=None, num_attention_heads=16)
    assert config_json.to_model(config, PATH).attention.kv_heads == 16


def test_windows_that_are_off_or_beyond_every_position_are_none() -> None:
    for config in (
        config_of("qwen2", use_sliding_window=False, sliding_window=1024),
        config_of("qwen3", sliding_window=4096, layer_types=["full_attention"] * 32),
        config_of("phi3", sliding_window=262144, max_position_embeddings=131072),
        config_of("mistral", max_position_embeddings=4096, sliding_window=4096),
    ):
        config_json.to_model(config, PATH)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("llama", attention_bias=True), "attention_bias is True; LlamaForCausalLM is"),
        (config_of("llama", mlp_bias=True), "mlp_bias is True"),
        (config_of("nemotron", attention_bias=True), "attention_bias is True"),
        (config_of("qwen3", attention_bias=True), "attention_bias is True"),
        (config_of("llama", hidden_act="gelu"), "hidden_act is 'gelu'; it must be 'silu'"),
        (config_of("nemotron", hidden_act="silu"), "hidden_act is 'silu'; it must be 'relu2'"),
        (config_of("llama", num_key_value_heads=3), "num_key_value_heads is 3; it must divide"),
        (config_of("llama", num_key_value_heads=0), "num_key_value_heads is 0; it must divide"),
        (config_of("llama", num_attention_heads=0), "num_attention_heads is 0"),
        (config_of("mistral", num_attention_heads=24), "head_dim is missing, and hidden_size"),
        (config_of("llama", num_attention_heads=24, head_dim=128), "no multiple of the 24 heads"),
        (config_of("nemotron", head_dim=64, kv_channels=96), "head_dim is 64, and kv_channels 96"),
        (config_of("llama", num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (config_of("llama", num_hidden_layers="32"), "num_hidden_layers is '32'"),
        (config_of("llama", hidden_size=-1), "hidden_size is -1"),
        (config_of("llama", rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (config_of("llama", tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
        (config_of("llama", max_position_embeddings="long"), "max_position_embeddings is 'long'"),
        ({"model_type": "mistral"}, "sliding_window is 4096, fewer than the 131072 positions"),
        (config_of("phi3", sliding_window=2047), "sliding_window is 2047"),
        (config_of("qwen2", use_sliding_window=True), "sliding_window is 4096, fewer than"),
        (config_of("qwen2", layer_types=["linear_attention"]), "layer_types has other words"),
        (config_of("qwen2", layer_types=3), "layer_types has other words"),
        (config_of("qwen2", layer_types=[[]]), "layer_types has other words"),
        (config_of("llama", hidden_act=["silu"]), "hidden_act is ['silu']"),
        (config_of("mistral", max_position_embeddings="9"), "max_position_embeddings is '9'"),
        (config_of("llama", rope_scaling={"type": ["llama3"]}), "rope_scaling.type is ['llama3']"),
        (config_of("llama", rope_theta=10**400), "rope_theta is 1000"),
        (
            {"model_type": "nemotron-nas", "block_configs": [
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1e308}}]},
            "block_configs.0.ffn.ffn_mult is 1e+308",
        ),
        (
            config_of("phi3", head_dim=64, original_max_position_embeddings=64,
                      partial_rotary_factor=0.5, max_position_embeddings=128,
                      rope_scaling={"type": "longrope", "short_factor": [1.0] * 16,
                                    "long_factor": [2.0] * 16}),
            "transformers counts the factors of longrope by hidden size / heads, 96",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_json.to_model(config, PATH)
    assert message in str(error.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        config_json.to_model(
            config_of("llama", hidden_size=-1, hidden_act="gelu", mlp_bias=True), PATH
        )
    assert all(key in str(error.value) for key in ("hidden_size", "hidden_act", "mlp_bias"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_of_an_import_has_the_model_and_the_length(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, 2, tmp_path / "hf")
    said = json.loads((folder / "config.json").read_text())
    import_folder(folder, tmp_path / "run", None)
    job = open_checkpoint(tmp_path / "run").job
    assert job.model == config_json.to_model(said, PATH)
    assert job.model.attention.rope.theta == said["rope_parameters"]["rope_theta"]
    assert job.model.init_std == said["initializer_range"]
    assert job.train.sequence_length == said["max_position_embeddings"]


def test_angles_in_old_files_are_left_out(tmp_path: Path) -> None:
    folder = folder_of("llama", 0, tmp_path / "hf")
    tensors = read_files(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_files(folder, tensors)
    import_folder(folder, tmp_path / "run", None)


def test_a_tied_head_may_stand_in_a_file_and_must_be_the_embedding(tmp_path: Path) -> None:
    folder = folder_of("llama", 0, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = read_files(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_files(folder, tensors)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        import_folder(folder, tmp_path / "run", None)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_files(folder, tensors)
    import_folder(folder, tmp_path / "run", None)


def test_transformers_is_compared_with_the_old_names_of_nemotron_too(tmp_path: Path) -> None:
    """It knows neither rope_percent nor kv_channels."""
    folder = folder_of("nemotron", 1, tmp_path / "hf")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_percent"] = config.pop("partial_rotary_factor")
    config["kv_channels"] = config.pop("head_dim", None) or 16
    path.write_text(json.dumps(config))
    model = config_json.to_model(config, path)
    loaded = load_theirs(folder, model)
    rotary = loaded.model.rotary_emb.inv_freq
    assert 2 * len(rotary) == model.attention.rope.turned(model.attention.head_dim)
    assert loaded.config.head_dim == config["kv_channels"]
