"""Checkpoints as NVIDIA's trainers write them: by Megatron-Core's own save, of a tiny model.

The dictionary is that of `generate_state_dict` and `save_checkpoint` in Megatron-LM d98e8a6
(training/checkpointing.py); the names of arguments are those of its training/arguments.py, written
here by hand, so that a wrong name in our table shows.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.tiny import EVERY_KIND, LENGTH, VOCAB

STEP, SAMPLES = 3, 12
# What `pretrain_hybrid.py` would hold for the model of `tests.tiny.tiny_job`.
ARGUMENTS: dict[str, Any] = {
    "num_layers": 6,
    "hybrid_layer_pattern": "MEM*|M-/*E/*E",
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "position_embedding_type": "none",
    "add_position_embedding": False,
    "use_rotary_position_embeddings": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "squared_relu": True,
    "swiglu": False,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "mamba_state_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_num_heads": 4,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_grouped_gemm": True,
    "mtp_num_layers": 2,
    "mtp_use_repeated_layer": True,
    "make_vocab_size_divisible_by": 16,
    "vocab_size": VOCAB,
    "padded_vocab_size": 64,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "consumed_train_samples": SAMPLES,
    "global_batch_size": 4,
}
assert ARGUMENTS["hybrid_layer_pattern"].replace("|", "") == EVERY_KIND


# Fields of HybridModelProvider (Megatron-Bridge 067f987, models/hybrid/hybrid_provider.py) and of
# its base, TransformerConfig, as training/config/yaml_utils.py of Megatron-LM writes them.
BRIDGE_MODEL: dict[str, Any] = {
    "_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider",
    "hybrid_layer_pattern": "MEM*M-",
    "mtp_hybrid_override_pattern": "*E",
    "mtp_num_layers": 2,
    "mtp_use_repeated_layer": True,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "seq_length": LENGTH,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "gated_linear_unit": False,
    "activation_func": {"_target_": "megatron.core.activations.squared_relu", "_call_": False},
    "share_embeddings_and_output_weights": False,
    "mamba_state_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_num_heads": 4,
    "mamba_chunk_size": 8,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "make_vocab_size_divisible_by": 16,
    "vocab_size": VOCAB,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "attention_backend": {
        "_target_": "megatron.core.transformer.enums.AttnBackend",
        "_call_": True, "_args_": [5], "_name_": "auto",
    },
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}  # fmt: skip
# Fields of SSMConfig and NemotronHConfigBase (NeMo 8cfedd7, collections/llm/gpt/model/ssm.py).
NEMO_PATTERN = "M*-"
NEMO_MODEL: dict[str, Any] = {
    "_target_": "nemo.collections.llm.gpt.model.ssm.MambaModel",
    "config": {
        "_target_": "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase",
        "hybrid_override_pattern": NEMO_PATTERN,
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "seq_length": LENGTH,
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "add_bias_linear": False,
        "gated_linear_unit": False,
        "activation_func": {
            "_target_": "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase.<lambda>",
            "_call_": False,
        },
        "share_embeddings_and_output_weights": False,
        "mamba_state_dim": 8,
        "mamba_head_dim": 16,
        "mamba_num_groups": 2,
        "mamba_num_heads": 4,
        "make_vocab_size_divisible_by": 16,
    },
}


def namespace(**changed: Any) -> argparse.Namespace:
    """Arguments as Megatron-LM keeps them, an enum and a number format of torch among them."""
    from megatron.core.transformer.enums import AttnBackend

    others = {"params_dtype": torch.float32, "attention_backend": AttnBackend.auto}
    return argparse.Namespace(**ARGUMENTS | others | changed)


def save_as_megatron_lm(
    engine: Any, groups: Any, root: Path, *, sharding: str = "fully_reshardable", **changed: Any
) -> Path:
    """Write a checkpoint of an engine into `root` as Megatron-LM does; return its folder.

    Args:
        engine: with one network.
        groups: its processes.
        root: the folder that Megatron-LM calls --save.
        sharding: how the distributed optimizer lays out its state; empty: there is none.
        changed: arguments with other values.
    """
    state = {"args": namespace(**changed), "iteration": STEP, "checkpoint_version": 3.0}
    folder = root / f"iter_{STEP:07d}"
    _save(engine, groups, folder, state, sharding)
    (root / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    return folder


def save_as_bridge(engine: Any, groups: Any, root: Path, **changed: Any) -> Path:
    """Write a checkpoint as Megatron-Bridge 067f987 does (training/checkpointing.py 1458)."""
    folder = root / f"iter_{STEP:07d}"
    state = {"iteration": STEP, "checkpoint_version": 3.0}
    _save(engine, groups, folder, state, "fully_reshardable")
    config = {
        "model": BRIDGE_MODEL | changed,
        "checkpoint": {"save_optim": True, "save_rng": False, "fully_parallel_save": True},
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    counts = {"step": STEP, "consumed_train_samples": SAMPLES, "skipped_train_samples": 0}
    counters = {name: torch.tensor(count, dtype=torch.int64) for name, count in counts.items()}
    torch.save(counters, folder / "train_state.pt")
    torch.save(counters, root / "latest_train_state.pt")
    return folder


def save_as_nemo(engine: Any, groups: Any, root: Path, **changed: Any) -> Path:
    """Write a checkpoint as NeMo 8cfedd7 does (lightning/io/pl.py, lightning/io/mixin.py).

    The keys of a model are those of `_module_sharded_state_dict` (lightning/megatron_parallel.py),
    what is beside them is of Lightning and of the data module (llm/gpt/data/pre_training.py).
    """
    state = {
        "global_step": STEP, "epoch": 0, "pytorch-lightning_version": "2.4.0",
        "PreTrainingDataModule": {"consumed_samples": SAMPLES},
    }  # fmt: skip
    _save(engine, groups, root / "weights", state, "", "module.")
    (root / "context").mkdir()
    model = NEMO_MODEL | {"config": NEMO_MODEL["config"] | changed}
    (root / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    (root / "context" / "io.json").write_text("{}")
    return root


def _save(
    engine: Any, groups: Any, folder: Path, state: dict[str, Any], sharding: str, prefix: str = ""
) -> None:
    from megatron.core import dist_checkpointing

    from hybrid_train.checkpoint.shards import bare

    folder.mkdir(parents=True, exist_ok=True)  # several ranks come here
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if sharding:
        content["distrib_optim_sharding_type"] = sharding  # type: ignore[assignment]
    metadata = content | {"dp_cp_group": groups.dp_cp}
    network = engine.network
    (chunk,) = network.chunks
    model = bare(chunk).sharded_state_dict(prefix=prefix, metadata=metadata)
    state |= {"model": model, "num_floating_point_operations_so_far": 0}
    state["optimizer"] = network.optimizer.sharded_state_dict(model, metadata=metadata)
    dist_checkpointing.save(state, str(folder), content_metadata=content, async_strategy="mcore")


def load_as_megatron_lm(model: Any, groups: Any, folder: Path, prefix: str = "") -> dict[str, Any]:
    """Load the weights of a folder into a bare model as Megatron-LM does; return what is beside."""
    from megatron.core import dist_checkpointing

    metadata = {"dp_cp_group": groups.dp_cp}
    state = {"model": model.sharded_state_dict(prefix=prefix, metadata=metadata)}
    loaded = dist_checkpointing.load(state, str(folder))
    weights = {name.removeprefix(prefix): one for name, one in loaded.pop("model").items()}
    model.load_state_dict(weights)
    found: dict[str, Any] = loaded
    return found
