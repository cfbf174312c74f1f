"""The family nemotron (Nemotron-4, Minitron, Nemotron-Mini): LayerNorm1P, squared ReLU, no gate.

Its norms have biases and store their weight minus 1, as ours do. Half of each head is turned where
no key says another share; older files call that share rope_percent or rope_percentage and the width
of a head kv_channels.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import TENSORS, Dense
from hybrid_train.hf.names import Spelling
from hybrid_train.schema.model import Activation, NormKind

_TENSORS: Mapping[str, str] = {**TENSORS, "mlp.linear_fc1.weight": "mlp.up_proj.weight"}


class Nemotron(Dense):
    """No linear has a bias; Minitron-8B has 48 heads of 128 channels on 4096."""

    model_type = "nemotron"
    architecture = "NemotronForCausalLM"
    spelling = Spelling("model.embed_tokens.weight", "model.layers.", _TENSORS, "model.norm")
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "relu2",
        "initializer_range": 0.0134,
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    }
    says: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "mlp_bias": False}
    norm_key = "norm_eps"
    norm = NormKind.layer_1p
    activation = Activation.squared_relu
    gated = False
    partial = True


NEMOTRON = Nemotron()
