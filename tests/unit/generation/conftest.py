"""Tiny networks by pattern, in a process of one rank, and what they say without a cache."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime.start import process
from hybrid_train.schema.model import (
    Attention,
    AttentionSizes,
    LayerRule,
    Mamba,
    MambaSizes,
    Mlp,
    Model,
    Moe,
)
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.runtime import Kernels, Runtime
from hybrid_train.schema.train import Train, TrainJob

if TYPE_CHECKING:
    from hybrid_train.training.network import Network

VOCAB = 61  # padded to 128 by the model
EVERY_KIND = "MEM*M-/*E/*E"
UNEQUAL = [
    LayerRule(layers="2", mamba=MambaSizes(heads=4)),
    LayerRule(layers="4", attention=AttentionSizes(heads=8, kv_heads=1)),
]
LONGEST_SUM = 128  # terms of the longest sum in a layer: inner width of Mamba and MLP

Build = Callable[..., "Network"]


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Builder of tiny networks by pattern."""
    runtime = Runtime(kernels=Kernels.plain, threads=1)
    with process(runtime, seed=1234):
        from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
        from hybrid_train.model.build import build_model
        from hybrid_train.training.network import Network, Routing

        job = TrainJob(runtime=runtime, precision=Precision(format=GemmFormat.fp32))
        groups = build_groups(job.parallel, timeout_s=60)

        @cache
        def build(
            pattern: str, number_format: GemmFormat = GemmFormat.fp32, unequal: bool = False
        ) -> "Network":
            job = tiny_job(pattern, number_format)
            job.model.layers = UNEQUAL if unequal else []
            on_gpu = torch.cuda.is_available()
            built = build_model(job, groups, VOCAB, on_gpu=on_gpu)
            let_every_layer_be_felt(built.chunks[0])
            device = torch.device(torch.cuda.current_device())
            network = Network(
                list(built.chunks), groups, device, Routing((), 0), built.balance_losses
            )
            network.train(False)
            return network

        yield build
        destroy_groups()


def let_every_layer_be_felt(chunk: torch.nn.Module) -> None:
    """Enlarge new weights: every layer would be a faint echo of the embedding."""
    for name, weight in chunk.named_parameters():
        if weight.dim() == 2 and "conv" not in name:
            weight.data.mul_(2)


def tiny_job(pattern: str, number_format: GemmFormat) -> TrainJob:
    return TrainJob(
        run_dir="unused",
        train=Train(tokens="1M", sequence_length=64, global_batch=1),
        model=Model(
            pattern=pattern,
            hidden_size=64,
            attention=Attention(heads=4, kv_heads=2, head_dim=16),
            mamba=Mamba(heads=8, head_dim=16, state_size=16, groups=2, chunk_size=8),
            mlp=Mlp(intermediate_size=128),
            moe=Moe(experts=4, top_k=2, intermediate_size=64, shared_intermediate_size=64,
                    latent_size=32),
        ),
        precision=Precision(format=number_format),
    )  # fmt: skip


def some_tokens(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(VOCAB, (rows, length), generator=generator)


def full_logits(network: "Network", tokens: Tensor) -> Tensor:
    """Logits after every token, [B, L, V], from one pass without a cache."""
    (model,) = network.chunks
    with torch.no_grad():
        logits: Tensor = model(tokens.to(network.device)).logits()
    return logits


def assert_equal_logits(actual: Tensor, expected: Tensor, layers: int) -> None:
    """Both sum the same float32 terms in another order.

    The roundings of a sum of K terms are a random walk of K steps of half an ulp; each layer adds
    as much, and the residual stream carries the sum on.
    """
    eps = torch.finfo(torch.float32).eps
    bound = layers * LONGEST_SUM**0.5 * eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)
