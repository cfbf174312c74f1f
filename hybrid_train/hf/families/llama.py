"""The family llama (Llama 2 to 3.3, Llama-3.1-Minitron): RMSNorm, gated SiLU, no biases."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import Dense
from hybrid_train.schema.model import Model


class Llama(Dense):
    """Whole heads are turned, by llama3 scaling since 3.1."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    says: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }

    def refusals(self, model: Model) -> Iterator[str]:
        yield from super().refusals(model)
        if model.hidden_size % model.attention.heads:
            yield (
                f"model.hidden_size is {model.hidden_size}: transformers 5 refuses one that is no "
                f"multiple of the {model.attention.heads} heads"
            )


LLAMA = Llama()
