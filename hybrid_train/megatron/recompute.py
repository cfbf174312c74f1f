"""Activations that are computed again in the backward pass instead of kept.

Core (0.19.2) does it for whole layers and for the modules of most kinds; what is missing stands
here: the Mamba layer, and a place where the second pass would need a compiler.
"""

from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine as te
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from hybrid_train.schema.parallel import Parallel, Recompute, RecomputeModule


def settings(parallel: Parallel) -> dict[str, object]:
    """Translate to fields of TransformerConfig."""
    if parallel.recompute is Recompute.none:
        return {}
    if parallel.recompute is Recompute.full:
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method.value,
            "recompute_num_layers": parallel.recompute_layers,
        }
    names = [part.value for part in modules(parallel) if part is not RecomputeModule.mamba]
    return {"recompute_granularity": "selective", "recompute_modules": names}


def modules(parallel: Parallel) -> list[RecomputeModule]:
    """Return the modules of `recompute=selective`; by default the two that keep most of all."""
    if parallel.recompute_modules is None:
        return [RecomputeModule.mamba, RecomputeModule.moe]
    return parallel.recompute_modules


def mamba_layer(parallel: Parallel) -> type[MambaLayer]:
    """Return the class of M layers; core has no switch for them (transformer_config.py 1768)."""
    selective = parallel.recompute is Recompute.selective
    return (
        RecomputedMamba if selective and RecomputeModule.mamba in modules(parallel) else MambaLayer
    )


class RecomputedMamba(MambaLayer):
    """A Mamba layer that keeps its input and computes the rest again for the gradients."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = partial(super().forward, **kwargs)
        if not self.training:
            return run(hidden_states, *args)
        if self.config.fp8 or self.config.fp4:  # whose scales only its own checkpoint restores
            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te.te_checkpoint(run, False, tracker, self.tp_group, hidden_states, *args)
        return tensor_parallel.checkpoint(run, False, hidden_states, *args)
