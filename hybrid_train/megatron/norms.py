"""Norms in plain PyTorch, with the parameter names of Transformer Engine's.

Each class takes the place of the one that its docstring names, with the same constructor. What a
norm is over may be masked: then it is that of the channels that are left.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import Parameter

from hybrid_train.ops.norm import gated_rms_norm, layer_norm_1p, rms_norm


class Norm(torch.nn.Module):
    """RMSNorm over the hidden axis; stands for TENorm."""

    channels: Tensor | None = None  # how many are not masked, []; set by edits

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        has_residual: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = norm_weight(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.channels)


class HeadNorm(Norm):
    """RMSNorm over the channels of each head of queries or keys, one weight for all heads.

    Each tensor rank sees its own heads; core sums up the gradients of these weights by their names,
    q_layernorm and k_layernorm (core 0.19.2, finalize_model_grads.py 451).
    """


class LayerNorm(Norm):
    """LayerNorm with a bias and a weight that is stored minus 1; stands for TENorm, too."""

    channels: Tensor | None = None  # 1 for each that is not masked, [H]; set by edits

    def __init__(self, config: TransformerConfig, hidden_size: int, **settings: Any) -> None:
        super().__init__(config, hidden_size, **settings)
        self.weight.data.zero_()
        self.bias = norm_weight(hidden_size, config, value=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_1p(x, self.weight, self.bias, self.eps, self.channels)


def norm_within(linear: Any, x: Tensor) -> Tensor:
    """Return what a linear with a norm in front of it multiplies; ours or Transformer Engine's."""
    weight, eps = linear.layer_norm_weight, linear.config.layernorm_epsilon
    bias, channels = (getattr(linear, name, None) for name in ("layer_norm_bias", "channels"))
    if bias is None:
        return rms_norm(x, weight, eps, channels)
    return layer_norm_1p(x, weight, bias, eps, channels)


def norm_weight(size: int, config: TransformerConfig, value: float = 1.0) -> Parameter:
    """Make weight or bias of a norm over the hidden axis, whole on every tensor-parallel rank."""
    weight = Parameter(
        torch.full((size,), value, dtype=config.params_dtype, device=torch.cuda.current_device())
    )
    # Under sequence parallelism each rank sees a part of the tokens: Megatron sums the parts.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class GatedNorm(torch.nn.Module):
    """Grouped RMSNorm of the Mamba mixer, split over tensor ranks; stands for ExtendedRMSNorm."""

    channels: Tensor | None = None  # how many of a group are not masked, []; set by edits

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "the family gates before the norm"
        self.eps = eps
        self.group_size = group_size or hidden_size
        self.weight = Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.tp_group: Any = None  # set by the mixer

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.eps, self.group_size, self.channels)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
