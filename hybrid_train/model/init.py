"""First values of the weights: the same numbers under every parallel layout.

Each tensor of the whole model is drawn from a generator seeded by its name, and a process keeps
the part it holds. Formulas: the initialisation of the released training code and configurations
(normal with 0.9 / sqrt(hidden), residual outputs divided by sqrt(layers), Mamba-2 as in Dao and
Gu, arXiv:2405.21060, reference code).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.kinds import Draw
from hybrid_train.anatomy.layers import main_layers, stored
from hybrid_train.megatron.sharded import ShardedTensor, sharded_tensors
from hybrid_train.megatron.stand_ins import plain_weights
from hybrid_train.schema.model import Model

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # step sizes that softplus(dt_bias) starts from
A_MIN, A_MAX = 1.0, 16.0  # decay rates that exp(A_log) starts from


def initialize(chunks: Sequence[torch.nn.Module], model: Model, *, std: float, seed: int) -> None:
    """Overwrite every parameter of the model chunks of this process.

    Args:
        chunks: of the model.
        model: what they are built from.
        std: standard deviation of most weights.
        seed: of all draws, with the name of a tensor.
    """
    draws = {key: one.draw for key, one in stored(model)}
    num_layers = len(main_layers(model))
    for chunk in chunks:
        with plain_weights(chunk) as in_fp8:
            storages = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
            for shard in sharded_tensors(chunk):
                if shard.data.untyped_storage().data_ptr() in storages:
                    rule = _draw_of(shard.key, draws)
                    _fill(shard, rule, std=std, num_layers=num_layers, seed=seed)
        for weight, drawn in in_fp8:  # by Transformer Engine, as it was built
            _take(weight, drawn)


@torch.no_grad()
def _take(weight: Any, drawn: Tensor) -> None:
    """Quantize what was drawn; masters begin with it as it was (core, distrib_optimizer.py 431)."""
    weight.copy_(drawn)
    weight.get_high_precision_init_val().copy_(drawn)


def _draw_of(key: str, draws: Mapping[str, Draw]) -> Draw:
    """Return how a tensor is drawn; a part of a packed one as the whole."""
    return draws[key] if key in draws else draws[key.rpartition(".")[0]]


@torch.no_grad()
def _fill(shard: ShardedTensor, rule: Draw, *, std: float, num_layers: int, seed: int) -> None:
    # Leading axes that only number experts or stages belong to the name, not to the tensor.
    numbered = shard.prepend_axis_num
    name = f"{seed}/{shard.key}/{shard.global_offset[:numbered]}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator(device=shard.data.device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    whole = torch.empty(shard.global_shape[numbered:], device=shard.data.device)
    draw(rule, whole, std=std, num_layers=num_layers, generator=generator)
    for axis, (start, size) in enumerate(
        zip(shard.global_offset[numbered:], shard.data.shape, strict=True)
    ):
        whole = whole.narrow(axis, start, size)
    shard.data.copy_(whole)


def draw(
    rule: Draw, whole: Tensor, *, std: float, num_layers: int, generator: torch.Generator
) -> None:
    """Fill one whole tensor in place by a rule."""
    if rule is Draw.taps:  # fan-in: the taps of one channel
        bound = 1 / math.sqrt(whole.shape[-1])
        whole.uniform_(-bound, bound, generator=generator)
    elif rule is Draw.tap_biases:
        whole.uniform_(-0.5, 0.5, generator=generator)
    elif rule is Draw.decay_rates:
        whole.uniform_(A_MIN, A_MAX, generator=generator).log_()
    elif rule is Draw.step_sizes:
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = whole.uniform_(low, high, generator=generator).exp_().clamp_(min=DT_FLOOR)
        whole.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    elif rule is Draw.ones:
        whole.fill_(1.0)
    else:
        assert rule in (Draw.normal, Draw.residual), f"no parameter begins as {rule}"
        scale = std / math.sqrt(num_layers) if rule is Draw.residual else std
        whole.normal_(0.0, scale, generator=generator)
