"""The family phi3 (Phi-4-mini): fused tensors, a share of each head turned, longrope.

qkv_proj has all queries, then all keys, then all values; gate_up_proj has the gates first. The
original length stands at the top of the config, and the class takes 4096 where it does not.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from hybrid_train.hf.families.dense import TENSORS, Dense
from hybrid_train.hf.names import Spelling
from hybrid_train.hf.rope_keys import ORIGINAL
from hybrid_train.schema.model import Model, RopeScaling

_TENSORS: Mapping[str, str] = {
    **TENSORS,
    "self_attention.linear_qkv.weight": "self_attn.qkv_proj.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
}


class Phi3(Dense):
    """Phi-4-mini turns 96 of 128 channels."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    spelling = Spelling("model.embed_tokens.weight", "model.layers.", _TENSORS, "model.norm")
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        ORIGINAL: 4096,
        "rms_norm_eps": 1e-5,
    }
    says: ClassVar[Mapping[str, Any]] = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "sliding_window": None,
    }
    partial = True
    scalings = (RopeScaling.none, RopeScaling.longrope)

    def _rope_keys(self, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        said, defaults = super()._rope_keys(config)
        return {ORIGINAL: self.defaults[ORIGINAL], **said}, defaults

    def refusals(self, model: Model) -> Iterator[str]:
        yield from super().refusals(model)
        attention, rope = model.attention, model.attention.rope
        derived = model.hidden_size // attention.heads
        is_long = rope.scaling is RopeScaling.longrope
        if is_long and int(derived * rope.fraction) != rope.turned(attention.head_dim):
            yield (
                f"model.attention.head_dim is {attention.head_dim}: transformers counts the "
                f"factors of longrope by hidden size / heads, {derived}"
            )


PHI3 = Phi3()
