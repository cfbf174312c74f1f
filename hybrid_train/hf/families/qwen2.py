"""The family qwen2 (Qwen2.5, AceReason): as llama, with biases of queries, keys and values.

No key says that there are such biases; the class does. A window is in most files and switched off.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import Dense


class Qwen2(Dense):
    """The output of attention has no bias."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    says: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False, "sliding_window": None}
    qkv_bias = True


QWEN2 = Qwen2()
