"""The Mamba-2 mixer: core's, with the model's epsilon, whole rows, and decoding of batches."""

from typing import Any

from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_mixer import MambaMixer as CoreMixer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybrid_train.megatron.packed_rows import PackedRows


class MambaMixer(CoreMixer):
    """Core's mixer, but for three of its faults (core 0.19.2)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Core gives the gated norm 1e-5 whatever the config says (mamba_mixer.py 419).
        self.norm.eps = config.layernorm_epsilon
        self.cp.__class__ = _WholeRows  # whose class core names itself

    def _ssm_decode(self, packed: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Advance the states by one token: packed [1, B, width] -> [1, B, inner].

        With a static cache core passes one token of each of B sequences on as B tokens of a single
        one: the first state takes them all, without a word (mamba_mixer.py 700-714).
        """
        if kwargs.get("batch_indices") is not None:  # dynamic batching has turned it already
            return super()._ssm_decode(packed, *args, **kwargs)
        return super()._ssm_decode(packed.transpose(0, 1), *args, **kwargs).transpose(0, 1)


class _WholeRows(MambaContextParallel):
    """Cuts rows over context ranks wherever their documents end.

    Core cuts every document for itself, by a kernel of Transformer Engine
    (mamba_context_parallel.py 380).
    """

    def pre_conv_ssm(self, input_: Tensor, packed_seq_params: PackedRows | None = None) -> Tensor:
        return super().pre_conv_ssm(input_)

    def post_conv_ssm(self, input_: Tensor, packed_seq_params: PackedRows | None = None) -> Tensor:
        return super().post_conv_ssm(input_)
