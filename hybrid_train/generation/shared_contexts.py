"""Log-probabilities of continuations, where several follow one context: it is read once.

A question with four answers is four texts that begin alike, as are questions behind the same worked
examples. What layers keep of the context is copied for each continuation (`cached_model`), so it
costs as much as one text. Texts that share nothing go into packed rows (`scoring`), which is faster
for them.

Dimensions: N scored tokens of all texts, T of one pass, B rows of a pass, W tokens of its window.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.generation.cached_model import CachedModel, why_not_cached
from hybrid_train.generation.scoring import (
    Rows,
    Scores,
    Text,
    border_of,
    require_finite,
    require_sound,
    score,
)
from hybrid_train.megatron.hybrid import whole_sequences
from hybrid_train.model.quantized import unwrapped
from hybrid_train.runtime import heartbeat
from hybrid_train.training.network import Network

_ROWS = Rows()
_MOST_ROWS = 16  # contexts, and continuations, of a pass; what each keeps takes memory
_PIECE = 512  # tokens of each context that a pass reads
_SHORT = 64  # tokens of each row that cost little more than the pass itself
_LEAST_STEM = 0.25  # of a text that shares it
_WORTH = 0.75  # of the tokens of packed rows: with more there is little to gain by sharing


@dataclass
class _Context:
    """Tokens that several texts begin with; at least one stands between them and what is scored.

    Attributes:
        tokens: at least one.
        texts: window -> the numbers of texts that are scored behind it. The window is what is read
            behind the context, up to the last token of a text, which no place sees. So
            continuations of one token share it.
    """

    tokens: tuple[int, ...]
    texts: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return len(self.tokens) + max(map(len, self.texts), default=0)

    def is_cut_by(self, border: int | None) -> bool:
        """Tell whether some texts take other factors of longrope than others."""
        shortest = len(self.tokens) + min(map(len, self.texts), default=0)
        return border is not None and shortest <= border < self.longest

    @property
    def is_worth_sharing(self) -> bool:
        """Whether reading it once saves much of reading each text."""
        apart = sum(len(self.tokens) + len(window) for window in self.texts)
        return bool(self.tokens) and len(self.tokens) + sum(map(len, self.texts)) < _WORTH * apart


def score_continuations(
    network: Network, texts: Sequence[Text], *, rows: Rows = _ROWS
) -> list[Scores]:
    """Score texts as `scoring.score` does, but read contexts that several share once.

    Where the layout cannot read on behind a context (it splits sequences, or is FSDP), all texts go
    into packed rows, as do those whose context nobody else has.

    Args:
        network: under any layout, trained or frozen; every process calls this with equal texts.
        texts: each is a context, up to its start, and a continuation.
        rows: how many tokens are read at once; changes speed and memory alone.

    Returns:
        The scores of each text, in the order given, the same on every process.

    Raises:
        ValueError: as of `score`.
        UserError: if a score is not a finite number.
    """
    require_sound(texts, network.vocab_size)
    config = unwrapped(network.chunks[0]).config
    contexts = [] if why_not_cached(network, config) else _contexts(texts)
    border = border_of(network)
    contexts = [one for one in contexts if not one.is_cut_by(border)]
    found = _Shared(network, texts, rows).scores(contexts) if contexts else {}
    rest = [number for number in range(len(texts)) if number not in found]
    packed = score(network, [texts[number] for number in rest], rows=rows)
    found |= dict(zip(rest, packed, strict=True))
    return [found[number] for number in range(len(texts))]


def _contexts(texts: Sequence[Text]) -> list[_Context]:
    """Return contexts that are worth sharing, the longest first."""
    found: dict[tuple[int, ...], _Context] = {}
    for number, text in enumerate(texts):
        if text.scored:
            before = tuple(text.tokens[: text.start - 1])
            window = tuple(text.tokens[text.start - 1 : -1])
            found.setdefault(before, _Context(before)).texts[window].append(number)
    worth = [one for one in found.values() if one.is_worth_sharing]
    rest = [one for one in found.values() if not one.is_worth_sharing]
    worth += _stems(texts, [alike for one in rest for alike in one.texts.values()])
    return sorted(worth, key=lambda one: -len(one.tokens))


def _stems(texts: Sequence[Text], kinds: Sequence[list[int]]) -> list[_Context]:
    """Return what contexts begin with that are not shared as a whole, as with worked examples.

    In the order of their tokens, a text joins those before it as long as it has much in common with
    them, and more is saved with it than without.

    Args:
        texts: all.
        kinds: numbers of texts, those that differ by their last token alone together.
    """
    runs: list[tuple[int, list[list[int]]]] = []  # how long a stem is, and whose
    before: Sequence[int] = ()
    for kind in sorted(kinds, key=lambda one: list(texts[one[0]].tokens)):
        text = texts[kind[0]]
        length, run = runs[-1] if runs else (0, [])
        common = min(length, text.start - 1, _in_common(before, text.tokens))
        is_much = common > _LEAST_STEM * len(text.tokens)
        if is_much and common * len(run) > length * (len(run) - 1):
            runs[-1] = (common, [*run, kind])
        else:
            runs.append((text.start - 1, [kind]))
        before = text.tokens
    found = []
    for length, run in runs:
        found.append(_Context(tuple(texts[run[0][0]].tokens[:length])))
        for kind in run:
            found[-1].texts[tuple(texts[kind[0]].tokens[length:-1])] += kind
    return [one for one in found if one.is_worth_sharing]


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Shared:
    """A cached model whose first rows are contexts, and the next ones their continuations.

    Data-parallel ranks have contexts of their own, but make equally many passes, in which their
    experts may lie on one another; the last row is for a pass with nothing to read.
    """

    def __init__(self, network: Network, texts: Sequence[Text], rows: Rows) -> None:
        self._network, self._texts, self._tokens = network, texts, rows.tokens
        counts = [text.scored for text in texts]
        self._slots = torch.tensor([0, *counts]).cumsum(0).tolist()
        self._found = torch.zeros(self._slots[-1], 2, device=network.device)

    def scores(self, contexts: Sequence[_Context]) -> dict[int, Scores]:
        """Score all texts behind some contexts: number of a text -> its scores."""
        before = heartbeat.last().part
        heartbeat.enter(heartbeat.VALIDATION)
        with self._network.in_eval_mode(), whole_sequences(self._network.chunks):
            self._model = CachedModel(self._network, 2 * _MOST_ROWS + 1)
            for by_rank in self._rounds(contexts):
                self._read_contexts(by_rank)
                self._read_windows(by_rank)
        dist.all_reduce(self._found)
        heartbeat.enter(before)
        numbers = [n for one in contexts for of in one.texts.values() for n in of]
        values = self._found.cpu()
        parts = [values[self._slots[n] : self._slots[n + 1]] for n in numbers]
        require_finite(parts)
        return {
            number: Scores(one[:, 0].clone(), one[:, 1] == 1)
            for number, one in zip(numbers, parts, strict=True)
        }

    def _rounds(self, contexts: Sequence[_Context]) -> Iterator[list[Sequence[_Context]]]:
        """Yield the contexts of each data-parallel rank that are worked on together."""
        ranks, first = self._network.groups.dp.size(), 0
        while first < len(contexts):
            longest = len(contexts[first].tokens)
            most = max(1, min(_MOST_ROWS, self._tokens // longest))
            part = contexts[first : first + ranks * most]
            least = longest - max(_SHORT, longest // 4)  # what is missing is padding
            part = [one for one in part if len(one.tokens) >= least]
            yield [part[rank::ranks] for rank in range(ranks)]
            first += len(part)

    def _read_contexts(self, by_rank: Sequence[Sequence[_Context]]) -> None:
        """Let each row read its context, in pieces; those of the first rank are the longest."""
        own = by_rank[self._network.groups.dp.rank()]
        for row, one in enumerate(own):
            self._model.clear(row, one.longest)
        longest = len(by_rank[0][0].tokens)
        for start in range(0, longest, _PIECE):
            pieces = [one.tokens[start : start + _PIECE] for one in own]
            self._read(0, [piece for piece in pieces if piece])  # the shortest are the last

    def _read_windows(self, by_rank: Sequence[Sequence[_Context]]) -> None:
        """Score all continuations of the contexts that rows have read."""
        passes = [list(self._passes(contexts)) for contexts in by_rank]
        own, rank = passes[self._network.groups.dp.rank()], self._network.groups.dp.rank()
        for number in range(max(map(len, passes))):
            if number >= len(own):
                self._read(0, [])
                continue
            for place, (row, _) in enumerate(own[number]):
                self._model.move(row, _MOST_ROWS + place)
            hidden = self._read(_MOST_ROWS, [window for _, window in own[number]])
            if hidden is not None:
                self._note(hidden, by_rank[rank], own[number])

    def _passes(self, contexts: Sequence[_Context]) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        """Yield what a pass reads: the row of a context, and a window behind it."""
        asked = [(row, window) for row, one in enumerate(contexts) for window in one.texts]
        asked.sort(key=lambda one: -len(one[1]))
        first = 0
        while first < len(asked):
            most = max(1, min(_MOST_ROWS, self._tokens // len(asked[first][1])))
            yield asked[first : first + most]
            first += most

    def _read(self, first: int, windows: Sequence[Sequence[int]]) -> Tensor | None:
        """Read a window for each row from one on; without any, let the last row read a token."""
        heartbeat.enter(heartbeat.VALIDATION)  # still there
        if not windows:
            first, windows = 2 * _MOST_ROWS, [[0]]
            self._model.clear(first)
        width = max(map(len, windows))
        ids = [[*window, *[0] * (width - len(window))] for window in windows]
        return self._model.read(slice(first, first + len(ids)), ids, list(map(len, windows)))

    def _note(
        self,
        hidden: Tensor,
        contexts: Sequence[_Context],
        asked: Sequence[tuple[int, tuple[int, ...]]],
    ) -> None:
        """Write the scores of a pass to their slots.

        A token is written by one process: the first tensor rank of a last pipeline stage.
        """
        labels: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        for line, (row, window) in enumerate(asked):
            for number in contexts[row].texts[window]:
                text = self._texts[number]
                labels += text.tokens[text.start :]
                scored = range(len(window) - text.scored, len(window))
                places += [line * hidden.shape[1] + place for place in scored]
                slots += range(self._slots[number], self._slots[number + 1])
        device = self._found.device
        values = self._model.label_scores(
            hidden, torch.tensor(labels, device=device), torch.tensor(places, device=device)
        )
        if self._network.groups.tp.rank() == 0:
            self._found[slots] = values
