"""What the layers remember of the tokens so far: keys and values, conv states, SSM states.

Dimensions: B sequences, T new tokens, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.megatron.inference import inference, mamba_mixers, static_context

# Below so many multiplications a step is a row of operations that are each over before several
# threads have met: with two of them a model of 3M parameters took 1.2 to 5 times as long.
_WORTH_THREADS = 32_000_000


class Cache:
    """The memory of a model that reads B sequences of equal length together.

    Each call costs what its new tokens cost, not what the whole sequence would; the attention
    layers alone look back over all tokens. The layers keep their part in Megatron's static
    inference context. MTP layers are not run.
    """

    def __init__(self, model: Hybrid, num_sequences: int, max_length: int) -> None:
        """Make an empty cache.

        Args:
            model: a whole model, in eval mode while the cache is in use.
            num_sequences: B.
            max_length: tokens of one sequence that the keys and values have room for.

        Raises:
            ValueError: if the model is a part of a pipeline or splits sequences.
        """
        self._model = model
        if not (self._model.pre_process and self._model.post_process):
            raise ValueError("a pipeline stage cannot generate; load the model on one process")
        if self._model.config.sequence_parallel:
            raise ValueError("a token cannot be split: generation needs parallel.sequence=false")
        self._num_weights = sum(one.numel() for one in model.parameters())
        self._num_sequences = num_sequences
        self._context = static_context(num_sequences, max_length)
        self._mixers = mamba_mixers(self._model.decoder)
        for mixer in self._mixers:
            self._context.key_value_memory_dict[mixer.layer_number] = self._empty_states(mixer)

    def _empty_states(self, mixer: Any) -> tuple[Tensor, Tensor]:
        """Make the conv and SSM state of one layer.

        The SSM state sums over the whole past: it is float32 where Megatron would take the type
        of the weights (mamba_mixer.py 1333, core 0.19.2).
        """
        conv_shape, ssm_shape = mixer.mamba_state_shapes_per_request()
        weight = mixer.conv1d_weight
        return (
            weight.new_zeros(self._num_sequences, *conv_shape),
            weight.new_zeros(self._num_sequences, *ssm_shape, dtype=torch.float32),
        )

    @property
    def length(self) -> int:
        """Tokens that each sequence has so far."""
        return int(self._context.sequence_len_offset)

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what a layer remembers, counted from 1.

        Mamba: conv state [B, channels, taps], SSM state [B, heads, head width, N]; attention, after
        the first tokens: keys and values, [max_length, B, kv_heads, head_dim] each.
        """
        first, second = self._context.key_value_memory_dict[layer]
        return first, second

    def read(self, tokens: Tensor) -> Tensor:
        """Append tokens and return what the model expects after the last of them.

        Args:
            tokens: [B, T]; T may be above 1 in the first call only.

        Returns:
            Logits of the next token, [B, V].

        Raises:
            ValueError: if the shape does not fit, or the cache is full.
        """
        batch, new = tokens.shape
        if batch != self._num_sequences or new < 1 or (self.length and new > 1):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)} after {self.length} tokens; "
                f"needs [{self._num_sequences}, any] at first, then [{self._num_sequences}, 1]"
            )
        if self.length + new > self._context.max_sequence_length:
            raise ValueError(
                f"{self.length} + {new} tokens exceed max_length = "
                f"{self._context.max_sequence_length} of the cache"
            )
        for mixer in self._mixers:
            # Else a layer that another cache used in between would start from zeros, silently.
            mixer.cached_batch_size = batch
        with inference(), _threads_for(self._num_weights * tokens.numel()):
            outputs = self._model(tokens, inference_context=self._context)
            logits: Tensor = outputs.head.logits(outputs.hidden[-1:])  # of the last position alone
        self._context.increment_sequence_len_offset(new)
        return logits[:, -1]


@contextlib.contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """Work in one thread where more would only wait for each other."""
    before = torch.get_num_threads()
    if before == 1 or multiplications >= _WORTH_THREADS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
