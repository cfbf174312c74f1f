"""The family mistral (Mistral NeMo, Mistral-NeMo-Minitron): as llama, with any width of its heads.

Mistral 7B v0.1 has a sliding window and is refused: attention without one is computed here. Where a
config has no key for the window, the class takes one of 4096 tokens.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import Dense


class Mistral(Dense):
    """Heads need not make up the hidden size: 32 of 128 channels on 5120 in NeMo."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    }
    says: ClassVar[Mapping[str, Any]] = {"sliding_window": None}


MISTRAL = Mistral()
