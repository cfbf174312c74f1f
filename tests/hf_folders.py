"""Toy Hugging Face folders of every shape in the family, written by the libraries of the format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from hybrid_train.hf import config_json
from hybrid_train.hf.families.nemotron_h import LAYER_TYPES, NEMOTRON_H
from hybrid_train.hf.read import INDEX, SINGLE

VOCAB = 61  # ours is padded to 128 rows
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "max_position_embeddings": 512,
    "time_step_min": 1e-30,  # transformers takes it for a lower limit of dt; the family has none
}
_MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
_MTP: dict[str, Any] = {
    "num_nextn_predict_layers": 1,
    "mtp_layers_block_type": ["full_attention", "moe"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense H": {"pattern": "M-M*-M-"},
    "v2, heads x width is not hidden": {
        "pattern": "M-M*-MM-",
        "head_dim": 12,
        "num_attention_heads": 6,
        "mamba_head_dim": 20,
        "layer_norm_epsilon": 1e-3,
    },
    "Nano 3, experts": {"pattern": "MEM*EME", **_MOE},
    "Super, latent experts, MTP": {"pattern": "MEM*EME", **_MOE, "moe_latent_size": 16, **_MTP},
}


def model_of(shape: str) -> NemotronHForCausalLM:
    """A model of transformers with random weights, none of which is as trivial as at the start."""
    sizes = dict(SHAPES[shape])
    words = [LAYER_TYPES[letter] for letter in sizes.pop("pattern")]
    config = NemotronHConfig(**_COMMON | sizes, layers_block_type=words)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = NemotronHForCausalLM(config).eval()
    scatter(model, 3)
    return model


def scatter(model: NemotronHForCausalLM, seed: int) -> None:
    """Give every weight that is trivial at the start a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith("mixer.D"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2, generator=generator)  # some choices change
            elif tensor.dim() == 2 and "gate" not in name:
                tensor.normal_(0, 0.1, generator=generator)


def folder_of(shape: str, folder: Path, *, stacked: bool = False, shards: int = 1) -> Path:
    """Write a model with its MTP tensors; `stacked`: under the names inside transformers."""
    model = model_of(shape)
    model.save_pretrained(folder, save_original_format=not stacked)
    tensors = load_file(folder / SINGLE) | mtp_tensors(folder)
    (folder / SINGLE).unlink()
    write_files(folder, tensors, shards)
    return folder


def mtp_tensors(folder: Path) -> dict[str, Tensor]:
    """Random weights of the MTP layers, which transformers ignores."""
    model = config_json.to_model(config_json.read_config(folder), folder / config_json.FILE)
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(4)
    return {
        part.name: torch.randn(part.shape, generator=generator)
        for stored in NEMOTRON_H.table(model, model.vocab_size)
        for part in stored.parts
        if part.name.startswith("mtp.")
    }


def write_files(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write tensors in one file, or dealt out over several with an index."""
    if shards == 1:
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_files(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def tokens_of(length: int, sequences: int = 2) -> Tensor:
    """Tokens that every toy model knows."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCAB, (sequences, length), generator=generator)
