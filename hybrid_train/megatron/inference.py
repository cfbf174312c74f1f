"""Generation by Megatron's layers: their static cache, and the mode in which they use it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode

from hybrid_train.megatron.mamba import MambaMixer


def mamba_mixers(model: torch.nn.Module) -> list[Any]:
    """Return the Mamba mixers of a module, in order."""
    return [part for part in model.modules() if isinstance(part, MambaMixer)]


def static_context(num_sequences: int, max_length: int) -> Any:
    """Return an empty cache of Megatron for sequences of equal length, decoded together."""
    return StaticInferenceContext(num_sequences, max_length)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Let core's layers use the cache they are given, without gradients, for one forward pass."""
    with torch.inference_mode(), InferenceMode.active():
        yield
