"""Continue token sequences, all of them together, one token at a time."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.generation.cache import Cache
from hybrid_train.generation.sampling import sample
from hybrid_train.megatron.hybrid import Hybrid


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
