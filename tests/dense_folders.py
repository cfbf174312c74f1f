"""Random Hugging Face folders of the dense families, by seed, written by transformers itself."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 61  # ours is padded to 128 rows
FAMILIES = ("llama", "mistral", "nemotron", "qwen2", "qwen3", "phi3")
SEEDS = range(20)
FAST_SEEDS = (0, 1)
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "nemotron": "Nemotron",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
}
ORIGINAL = (24, 40, 64)  # tokens before a scaling; some rows of a test are longer


def config_of(family: str, seed: int) -> dict[str, Any]:
    """Return the arguments of a random config of transformers' class."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice((1, 2, 4, 6))
    head_dim = draw.choice((8, 12, 16))
    hidden = draw.choice((16, 24, 32, 48))
    is_free = family != "llama" and draw.random() < 0.7  # heads that do not make up the hidden size
    if not is_free:
        hidden = heads * head_dim
    is_partial = family in ("nemotron", "phi3")
    share = draw.choice((0.5, 1.0, 0.75 if head_dim != 12 else 0.5)) if is_partial else 1.0
    rope, lengths = _rope(draw, family, int(head_dim * share) // 2)
    rope |= {"partial_rotary_factor": share} if family in ("nemotron", "phi3") else {}
    if family == "phi3" and rope["rope_type"] == "longrope":
        hidden = heads * head_dim  # the class counts the factors by that
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": draw.choice((20, 32, 56)),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": head_dim,
        "norm_eps" if family == "nemotron" else "rms_norm_eps": draw.choice((1e-5, 1e-6, 1e-3)),
        "initializer_range": draw.choice((0.02, 0.0134, 0.1)),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": rope,
        **lengths,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **({"sliding_window": None} if family in ("mistral", "phi3") else {}),
    }


def _rope(draw: random.Random, family: str, pairs: int) -> tuple[dict[str, Any], dict[str, Any]]:
    theta, length = draw.choice((10000.0, 500000.0, 37.0)), 512
    kinds = {"phi3": ("default", "longrope")}.get(family, ("default", "llama3", "longrope"))
    kind = draw.choice(kinds)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if kind == "default":
        return rope, {"max_position_embeddings": length}
    original = draw.choice(ORIGINAL)
    top = {"original_max_position_embeddings": original}
    if kind == "llama3":
        rope |= {"factor": draw.choice((8.0, 32.0)), "low_freq_factor": 1.0, **top}
        return rope | {"high_freq_factor": 4.0}, {"max_position_embeddings": length}
    rope |= {
        "short_factor": [draw.uniform(1, 1.5) for _ in range(pairs)],
        "long_factor": [draw.uniform(1, 20) for _ in range(pairs)],
        "original_max_position_embeddings": original,
    }
    top = top if family == "phi3" else {}
    return rope, {"max_position_embeddings": original * draw.choice((1, 4, 8)), **top}


def model_of(family: str, seed: int) -> PreTrainedModel:
    """A model of transformers with random weights, none of which is as trivial as at the start."""
    name = CLASSES[family]
    config = getattr(transformers, f"{name}Config")(**config_of(family, seed))
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.uniform_(-0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, 0.3, generator=generator)
    return model


def folder_of(family: str, seed: int, folder: Path) -> Path:
    """Write a model; every second one with the keys of transformers 4."""
    model_of(family, seed).save_pretrained(folder)
    if seed % 2:
        path = folder / "config.json"
        path.write_text(json.dumps(older(json.loads(path.read_text())), indent=2))
    return folder


def older(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as transformers 4 writes it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    if (share := rope.pop("partial_rotary_factor", None)) is not None:
        config["partial_rotary_factor"] = share
    kind = rope.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    if kind == "default":
        config["rope_scaling"] = None
    elif kind == "longrope" and config["model_type"] == "phi3":
        del rope["original_max_position_embeddings"]  # at the top already
        config["rope_scaling"] = {"type": "su", **rope}
    else:
        config["rope_scaling"] = {"rope_type": kind, **rope}
    derived = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if derived and config["model_type"] != "qwen3":
        del config["head_dim"]
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        config["num_key_value_heads"] = None
    return config
