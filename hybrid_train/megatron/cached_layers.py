"""The layers of a stack: core's, and behind a cache nothing but their one part and an addition.

What core keeps ready around a part (norms and attentions that are not there, dropout, offload,
graphs) costs a token of a small model as much as the part.

Dimensions: S sequence, B batch, H hidden.
"""

from typing import Any

from megatron.core.ssm import mamba_layer, mlp_layer
from megatron.core.transformer import transformer_layer
from torch import Tensor

from hybrid_train.megatron.row_cache import RowCache


class MambaLayer(mamba_layer.MambaLayer):
    """A mixer; the norm is in its first linear layer."""

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: Any = None, **kwargs: Any
    ) -> Tensor:
        """Mix [S, B, H] and add."""
        if not isinstance(inference_context, RowCache):
            whole: Tensor = super().forward(
                hidden_states, *args, inference_context=inference_context, **kwargs
            )
            return whole
        y, _ = self.mixer(hidden_states, inference_context=inference_context)
        return hidden_states + y


class _OfOnePart:
    """What the three kinds of layers have in common that derive from one class of core."""

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the part of [S, B, H] and add."""
        if not isinstance(inference_context, RowCache):
            return super().forward(  # type: ignore[misc]
                hidden_states, *args, inference_context=inference_context, **kwargs
            )
        return hidden_states + self.part(hidden_states, inference_context), None

    def part(self, x: Tensor, cache: RowCache) -> Tensor:
        """Apply what stands in the place of the MLP, and the norm before it, where there is one."""
        y: Tensor = self.mlp(self.pre_mlp_layernorm(x))[0]  # type: ignore[attr-defined]
        return y


class AttentionLayer(_OfOnePart, transformer_layer.TransformerLayer):
    """Attention; the norm is in its first linear layer."""

    def part(self, x: Tensor, cache: RowCache) -> Tensor:
        """Attend to the past and the window."""
        y: Tensor = self.self_attention(x, None, inference_context=cache)[0]
        return y


class MlpLayer(_OfOnePart, mlp_layer.MLPLayer):
    """An MLP; the norm is in its first linear layer."""


class MoeLayer(_OfOnePart, transformer_layer.MoETransformerLayer):
    """A norm and experts."""
