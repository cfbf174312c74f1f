"""The family qwen3: as llama, with a norm of each head of queries and keys before they are turned.

The class takes 128 channels of a head where a config has no head_dim, whatever the hidden size. A
window is in most files and switched off.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import Dense


class Qwen3(Dense):
    """One weight of the norm serves all heads of queries, another all heads of keys."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    says: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }
    qk_norm = True


QWEN3 = Qwen3()
