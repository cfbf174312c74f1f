"""Continue token sequences, all together, one token at a time: decoding, sampling, the cache.

Dimensions: B sequences, T new tokens, V tokens of the vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_train.megatron.hybrid import (
    Hybrid,
    inference,
    mamba_mixers,
    static_context,
)

# Below so many multiplications a step is a row of operations that are each over before several
# threads have met: with two of them a model of 3M parameters took 1.2 to 5 times as long.
_WORTH_THREADS = 32_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to choose tokens and when to stop; `sample` explains the first three."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    max_new_tokens: int = 128  # of each sequence
    vocab_size: int  # ids from here on are padding of the vocabulary and never drawn
    ends: frozenset[int] = frozenset()  # each of them ends a sequence; none: only the length does


def stream(
    model: Hybrid, prompts: Sequence[Sequence[int]], settings: Settings
) -> Iterator[list[int | None]]:
    """Yield the new token of every sequence after each step of the model.

    Prompts may differ in length. The first step reads as many tokens as the shortest has; from
    there on all sequences grow by one token a step, and those whose prompt goes on take its next
    token instead of a drawn one. So they always have equal length, and as no layer looks ahead,
    each gets what it would get alone (up to rounding).

    Args:
        model: a whole model; it comes back in the mode (training or not) that it is in.
        prompts: token ids, at least one each.
        settings: how to choose and when to stop.

    Yields:
        A token for each prompt, or None where its prompt goes on or its end is reached. The token
        that ends it is given as well.

    Raises:
        ValueError: if there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("generation needs at least one prompt, of at least one token each")
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    rows = [_Row(prompt, settings) for prompt in prompts]
    with _evaluating(model):
        cache = Cache(model, len(rows), longest + settings.max_new_tokens)
        tokens = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=device)
        while not all(row.finished for row in rows):
            drawn = _draw(cache.read(tokens), settings, generator)
            taken = [row.take(cache.length, token) for row, token in zip(rows, drawn, strict=True)]
            tokens = torch.tensor([[row.latest] for row in rows], device=device)
            yield taken


def generate(
    model: Hybrid, prompts: Sequence[Sequence[int]], settings: Settings
) -> list[list[int]]:
    """Return the continuation of each prompt; arguments and errors as of `stream`."""
    steps = list(stream(model, prompts, settings))
    columns = zip(*steps, strict=True)
    return [[token for token in column if token is not None] for column in columns]


class _Row:
    """One of the sequences that grow together."""

    def __init__(self, prompt: Sequence[int], settings: Settings) -> None:
        self._prompt = prompt
        self._ends = settings.ends
        self._left = settings.max_new_tokens
        self.latest = prompt[-1]

    @property
    def finished(self) -> bool:
        return self._left == 0

    def take(self, position: int, drawn: int) -> int | None:
        """Append a token at a position; return it if it is new."""
        if position < len(self._prompt):
            self.latest = self._prompt[position]
            return None
        self.latest = drawn  # after the end as well: the others need a full row
        if self.finished:
            return None
        self._left = 0 if drawn in self._ends else self._left - 1
        return drawn


def _draw(logits: Tensor, settings: Settings, generator: torch.Generator) -> list[int]:
    """Choose one token per sequence."""
    drawn = sample(
        logits[:, : settings.vocab_size],
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=generator,
    )
    return [int(token) for token in drawn.tolist()]


@contextlib.contextmanager
def _evaluating(model: Hybrid) -> Iterator[None]:
    """Put the model into eval mode for a while.

    By way of train mode: that alone tells the mixers that the decay rates they remember may be
    old (mamba_mixer.py 1075, core 0.19.2).
    """
    training = model.training
    model.train()
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per sequence; equal generators draw equal tokens.

    The order is temperature, then top-k, then top-p on what top-k left.

    Args:
        logits: [B, V].
        temperature: divides the logits; 0 takes the most likely token (the first of equals).
        top_k: tokens that may be drawn, the most likely ones; those as likely as the last of them
            stay as well. 0: all.
        top_p: the smallest set of most likely tokens with at least this mass may be drawn; at
            least one token. 1: all.
        generator: source of randomness, on the device of the logits; None: the global one.

    Returns:
        Token ids, [B], int64.

    Raises:
        ValueError: if a setting is out of its range.

    Source: Fan et al., arXiv:1805.04833, section 5 (top-k); Holtzman et al., arXiv:1904.09751,
        section 3.1 (top-p).
    """
    if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(
            f"temperature={temperature} and top_k={top_k} must not be negative, "
            f"top_p={top_p} must lie in [0, 1]"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)
    drawn = torch.multinomial(scaled.softmax(dim=-1), num_samples=1, generator=generator)
    return drawn.squeeze(-1)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits and equals of the last one, -inf elsewhere; [B, V]."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with a mass of at least `top_p`, -inf elsewhere; [B, V].

    Of equally likely tokens the lower id goes first.
    """
    if top_p == 1:
        return logits
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1)
    dropped = mass.cumsum(dim=-1) - mass >= top_p  # the tokens before it have the mass already
    dropped[..., 0] = False
    return logits.masked_fill(dropped.scatter(-1, token, dropped), -torch.inf)


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
