"""Blocks of Puzzle models: counts of the released ones, logits of a few in float64, round trips."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hybrid_train.anatomy.counts import parameters
from hybrid_train.anatomy.layers import main_layers
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.hf import config_json
from hybrid_train.hf.read import Folder, import_folder
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.convert import differences
from hybrid_train.schema.problems import UserError
from tests.hf_folders import VOCAB, read_files, tokens_of, write_files
from tests.tiny import MEGATRON_WARNINGS, RUNTIME

pytestmark = MEGATRON_WARNINGS
PATH = Path("config.json")
SHARE = 5e-5  # of the standard deviation; angles are float32, 2e-5 at position 300
HUGE = 2**40  # bytes of a file: one file for all
# Blocks: query heads a KV group / multiple of the FFN; - for a no-op. Of the released files.
SUPER = (
    "0:8/2.625 1-5:8/5.25 6-7:-/2.625 8-10:8/5.25 11:-/3.28125 12-41:8/5.25 42:-/1.3125 "
    "43-44:-/2.625 45:-/1.3125 46:-/5.25 47:-/1.3125 48:-/2.625 49-51:-/1.3125 52:8/5.25 "
    "53:-/1.3125 54-55:-/1.0 56:-/1.3125 57-59:-/1.0 60-61:-/1.3125 62-63:-/0.5 64-65:-/1.0 "
    "66-67:-/0.5 68:-/1.0 69-70:-/0.5 71-79:8/5.25"
)
ULTRA = (
    "0:16/0.4875 1:16/0.975 2-7:16/1.4625 8:16/1.95 9-12:-/- 13-15:16/1.95 16-17:16/4.875 "
    "18-23:-/- 24-26:16/4.875 27-31:-/- 32-34:16/4.875 35:16/2.4375 36-38:-/- 39-41:16/1.95 "
    "42:-/1.95 43:16/4.875 44:-/4.875 45-49:-/- 50-53:16/4.875 54-58:-/- 59-62:16/4.875 "
    "63-67:-/- 68-71:16/4.875 72-76:-/- 77-80:16/4.875 81-85:-/- 86:16/4.875 87-89:16/3.4125 "
    "90-91:-/- 92:16/2.925 93-95:16/2.4375 96-97:-/2.4375 98:16/2.4375 99:-/- "
    "100-106:-/2.4375 107:16/2.4375 108-112:-/- 113:16/2.925 114:16/4.875 115:-/4.875 "
    "116:16/4.875 117-124:-/- 125:-/36.5625 126-133:-/- 134:-/39.0 135-142:-/- "
    "143:-/31.40625 144-148:-/- 149:-/27.5625 150:-/1.95 151:16/1.95 152:16/2.4375 153:-/- "
    "154-155:16/2.4375 156:16/3.4125 157-160:16/4.875 161:16/2.4375"
)
# Two that compute everything, one without attention, one without anything, one without an MLP.
TINY = "0:2/8.0 1:4/16.0 2:-/8.0 3:-/- 4:2/-"


def block(heads: str, multiple: str) -> dict[str, Any]:
    """Return a block as the released files have it."""
    has_attention, has_ffn = heads != "-", multiple != "-"
    return {
        "attention": {
            "n_heads_in_group": int(heads) if has_attention else None,
            "no_op": not has_attention,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            "ffn_mult": float(multiple) if has_ffn else None,
            "no_op": not has_ffn,
            "replace_with_linear": False,
            "sparsify": None,
        },
    }


def config_of(text: str, **changes: Any) -> dict[str, Any]:
    blocks = []
    for part in text.split():
        numbers, _, sizes = part.partition(":")
        first, _, last = numbers.partition("-")
        blocks += [block(*sizes.split("/")) for _ in range(int(first), int(last or first) + 1)]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"},
        "block_configs": blocks,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 64,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 128256,
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "sizes", "total", "widths"),
    [
        (SUPER, {}, 49_867_145_216, 1_642_496),
        (ULTRA, {"hidden_size": 16384, "num_attention_heads": 128}, 253_401_268_224, 4_327_168),
    ],
    ids=["Super 49B", "Ultra 253B"],
)
def test_the_released_blocks_count_as_published(
    text: str, sizes: dict[str, int], total: int, widths: int
) -> None:
    config = config_of(text, **sizes)
    model = config_json.to_model(config, PATH)
    assert parameters(model, 128256).total == total
    assert sum(one.sizes.ffn for one in main_layers(model) if one.letter == "-") == widths
    family = config_json.family_for(model, config)
    made = family.to_config(
        family.told(model), vocab_size=128256, length=131072, dtype="bfloat16", token_ids={}
    )
    assert config_json.to_model(made, PATH) == model
    halves = [[one[half]["no_op"] for half in one] for one in config["block_configs"]]
    assert [[one[half]["no_op"] for half in one] for one in made["block_configs"]] == halves


def tiny_folder(folder: Path) -> Path:
    """Write random weights under the released names."""
    config = config_of(
        TINY, hidden_size=48, num_attention_heads=8, head_dim=8, vocab_size=VOCAB,
        rope_scaling=config_of(TINY)["rope_scaling"] | {"original_max_position_embeddings": 32},
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1)

    tensors = {"model.embed_tokens.weight": drawn(VOCAB, 48), "lm_head.weight": drawn(VOCAB, 48)}
    tensors["model.norm.weight"] = drawn(48)
    for number, one in enumerate(config["block_configs"]):
        name = f"model.layers.{number}."
        if not one["attention"]["no_op"]:
            keys = 64 // one["attention"]["n_heads_in_group"]
            tensors |= {
                f"{name}input_layernorm.weight": drawn(48),
                f"{name}self_attn.q_proj.weight": drawn(64, 48),
                f"{name}self_attn.k_proj.weight": drawn(keys, 48),
                f"{name}self_attn.v_proj.weight": drawn(keys, 48),
                f"{name}self_attn.o_proj.weight": drawn(48, 64),
            }
        if not one["ffn"]["no_op"]:
            width = {8.0: 256, 16.0: 512}[one["ffn"]["ffn_mult"]]
            tensors |= {
                f"{name}post_attention_layernorm.weight": drawn(48),
                f"{name}mlp.gate_proj.weight": drawn(width, 48),
                f"{name}mlp.up_proj.weight": drawn(width, 48),
                f"{name}mlp.down_proj.weight": drawn(48, width),
            }
    write_files(folder, tensors)
    return folder


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def turned(x: Tensor, original: int) -> Tensor:
    """Turn channels, [B, H, L, D], by angles of Llama 3.1."""
    channels = x.shape[-1]
    frequencies = []
    for pair in range(channels // 2):
        plain = 500000.0 ** (-2 * pair / channels)
        turns = original * plain / (2 * math.pi)  # of this pair over the original length
        kept = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        frequencies.append(plain * (kept + (1 - kept) / 8.0))
    angles = torch.outer(torch.arange(x.shape[-2]).double(), torch.tensor(frequencies).double())
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def attention(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    rows, length, _ = x.shape
    query, key, value = (
        (x @ weights[f"{name}{part}_proj.weight"].T).view(rows, length, -1, 8).transpose(1, 2)
        for part in "qkv"
    )
    serves = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(serves, dim=1) for one in (turned(key, 32), value))
    scores = turned(query, 32) @ key.transpose(2, 3) / math.sqrt(8)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    seen = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    return seen.transpose(1, 2).reshape(rows, length, -1) @ weights[f"{name}o_proj.weight"].T


def expected_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Compute the logits in float64, from the files."""
    weights = {name: value.double() for name, value in read_files(folder).items()}
    x = weights["model.embed_tokens.weight"][tokens]
    for number in range(5):
        name = f"model.layers.{number}."
        if f"{name}input_layernorm.weight" in weights:
            normed = norm(x, weights[f"{name}input_layernorm.weight"])
            x = x + attention(normed, weights, f"{name}self_attn.")
        if f"{name}mlp.gate_proj.weight" in weights:
            normed = norm(x, weights[f"{name}post_attention_layernorm.weight"])
            gate, up = (
                normed @ weights[f"{name}mlp.{one}_proj.weight"].T for one in ("gate", "up")
            )
            x = x + (silu(gate) * up) @ weights[f"{name}mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def test_blocks_compute_what_a_reference_in_float64_does(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.model.build import build_model

    folder = tiny_folder(tmp_path / "hf")
    import_folder(folder, tmp_path / "run", None)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.model.pattern == "*-*--*"
    checkpoint.job.runtime = RUNTIME
    ours = build_model(checkpoint.job, groups, VOCAB, on_gpu=False).chunks[0].eval()
    read_weights(checkpoint.found.path, [ours], groups)
    for length in (1, 17, 300):
        tokens = tokens_of(length)
        with torch.no_grad():
            found = ours(tokens).logits()[..., :VOCAB]
        expected = expected_logits(folder, tokens)
        assert (found - expected).abs().max() < SHARE * expected.std(), length


def test_a_round_trip_keeps_every_bit_and_the_numbers_of_blocks_that_compute_nothing(
    tmp_path: Path,
) -> None:
    folder = tiny_folder(tmp_path / "hf")
    import_folder(folder, tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    before, after = read_files(folder), read_files(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.startswith("model.layers.4.") for name in after)
    said, kept = (
        json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "out")
    )
    assert said == kept
    checkpoint = open_checkpoint(tmp_path / "run")
    with StoredTensors(checkpoint.found.path) as stored, Folder(folder) as theirs:
        assert not differences(checkpoint, Weights(stored, best=False), theirs).lines()
    with pytest.raises(UserError, match=r"no class for nemotron-nas: .* logits=false"):
        load_theirs(folder, checkpoint.model)


def changed(half: str, **values: Any) -> dict[str, Any]:
    config = config_of(TINY, num_attention_heads=8, hidden_size=48)
    config["block_configs"][1][half] |= values
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            changed("attention", window_length=4096),
            "block_configs.1.attention.window_length is 4096",
        ),
        (
            changed("ffn", replace_with_linear=True),
            "block_configs.1.ffn.replace_with_linear is True",
        ),
        (changed("ffn", moe={"num_experts": 4}), "block_configs.1.ffn.moe is"),
        (changed("ffn", hidden_act="gelu"), "block_configs.1.ffn.hidden_act is 'gelu'"),
        (changed("attention", n_heads_in_group=3), "it must divide the number of heads, 8"),
        (changed("ffn", ffn_mult=None), "block_configs.1.ffn.ffn_mult is None"),
        (config_of(TINY, num_hidden_layers=9), "num_hidden_layers is 9, and block_configs has 5"),
        (config_of(TINY, intermediate_size=99), "intermediate_size is 99; block_configs has one"),
        (config_of(TINY, block_configs=None), "block_configs is no list of blocks"),
        (config_of("0:-/-"), "block_configs has no block that computes"),
    ],
)
def test_blocks_that_cannot_be_computed_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_json.to_model(config, PATH)
    assert message in str(error.value)


def test_a_width_that_is_no_multiple_of_256_cannot_be_said() -> None:
    model = config_json.to_model(config_of(TINY, hidden_size=48, num_attention_heads=8), PATH)
    model.mlp.intermediate_size, model.layers = 300, []
    with pytest.raises(UserError, match=r"nemotron-nas: the MLP of layer 2 is 300 wide: .* of 256"):
        config_json.family_for(model)
