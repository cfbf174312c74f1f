"""Requests in, new tokens out: rows that come and go, prompts read in pieces, drafts verified.

Every process of a layout runs the same loop over the same requests and yields the same tokens. The
ranks of a pipeline and of tensor parallelism work on the same rows; each data-parallel rank has
rows of its own, in step with the others, since their experts may lie on one another.

Dimensions: B rows of a pass, W tokens of its window, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.generation.cached_model import CachedModel
from hybrid_train.generation.drafting import Drafting, Record
from hybrid_train.generation.requests import Finish, NewTokens, Request
from hybrid_train.generation.sampling import Place, choose
from hybrid_train.megatron.hybrid import whole_sequences
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

_NOBODY = -1  # the number of a request that nobody made
_NOT_FINITE = -1  # the token that is chosen among numbers that are none
PROMPT_CHUNK = 512  # tokens of each prompt that are read between two steps of the other rows
SHORT_PIECE = 64  # tokens of each that cost little more than the pass itself


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests are worked on; nothing of it changes an answer, but for rounding.

    Attributes:
        vocab_size: ids from here on are padding of the vocabulary and never chosen.
        rows: answers that grow together, on each data-parallel rank.
        drafts: tokens that the MTP block drafts ahead; None: as many as pay.
        log_probs: whether each new token comes with its log-probability.
    """

    vocab_size: int
    rows: int = 8
    drafts: int | None = 0
    log_probs: bool = False

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.rows < 1 or (self.drafts is not None and self.drafts < 0):
            raise ValueError(
                f"{self}: needs vocab_size and rows of at least 1, drafts of at least 0"
            )


def stream(
    network: Network,
    requests: Iterable[Request],
    settings: Batching,
    record: Record | None = None,
) -> Iterator[NewTokens]:
    """Continue requests and yield what each step of the model adds to each.

    Requests are taken as rows become free.

    Args:
        network: a model under any layout without context parallelism or FSDP, also one that is
            being trained; it comes back as it is. Every process calls this with equal arguments,
            and reads to the end what it yields.
        requests: prompts with what is asked for.
        settings: how they are worked on.
        record: where steps and drafts are counted, those of all data-parallel ranks.

    Raises:
        ValueError: if the model does not know a token of a prompt.
        UserError: if drafts are wanted of a model without an MTP block, the layout does not let
            tokens be read one by one, logits are not finite, or another process has failed.
    """
    # Passes alone are without gradients: between them runs what the reader does with the tokens.
    with network.in_eval_mode(), whole_sequences(network.chunks):
        yield from _Loop(network, requests, settings, record or Record()).steps()


class _Row:
    """One request at work."""

    def __init__(self, number: int, request: Request) -> None:
        self.number = number
        self.request = request
        self.watcher = request.watch()
        self.tokens = list(request.prompt)  # of prompt and answer
        self.finish: Finish | None = None

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def places(self, drafts: Sequence[int]) -> list[Place]:
        """Return where its next tokens stand: behind all it has, and behind each draft."""
        reads_tokens = self.request.sampling.repetition_penalty != 1
        return [
            Place(
                self.request.sampling,
                self.answered + number,
                [*self.tokens, *drafts[:number]] if reads_tokens else (),
            )
            for number in range(len(drafts) + 1)
        ]

    def take(self, chosen: Sequence[int], drafts: Sequence[int]) -> tuple[int, int]:
        """Append the token chosen at each place, as long as the drafts before it were right.

        Args:
            chosen: the token behind all it has, and behind each draft.
            drafts: what those behind it were guessed to be.

        Returns:
            How many drafts were right or wrong, and how many of them were right. A wrong one makes
            all behind it wrong, but none is judged behind a forced token or the end of the answer.
        """
        accepted = 0
        for number, token in enumerate(chosen):
            forced = self.watcher.forced()
            token = token if forced is None else forced
            self.tokens.append(token)
            if token in self.request.ends:
                self.finish = Finish.end
            elif self.watcher.take(token):
                self.finish = Finish.stop
            elif self.answered >= self.request.max_new_tokens:
                self.finish = Finish.length
            if number == len(drafts):
                break
            if token != drafts[number]:
                return (number if forced is not None else len(drafts)), accepted
            accepted += 1
            if self.finish:
                break
        return accepted, accepted


class _Loop:
    """The rows at work: those that answer come first, behind them those whose prompt is read."""

    def __init__(
        self, network: Network, requests: Iterable[Request], settings: Batching, record: Record
    ) -> None:
        self._groups = network.groups
        self._settings = settings
        dp = network.groups.dp
        self._idle = settings.rows  # the row of a rank that has nothing to do while others have
        self._model = CachedModel(network, settings.rows + (dp.size() > 1))
        self._vocab_size = min(settings.vocab_size, network.vocab_size)
        self._record = record
        self._drafting = Drafting(network, settings.drafts, record)
        self._waiting = itertools.islice(enumerate(requests), dp.rank(), None, dp.size())
        self._rows: list[_Row] = []
        self._answering = 0  # how many of the rows
        self._failure: Exception | None = None  # of this process, which ends all in the next round

    def steps(self) -> Iterator[NewTokens]:
        """Work until no process has anything left."""
        while True:
            failure = self._failure or self._admit()
            reads, answers, fails = self._anywhere(
                len(self._rows) > self._answering, self._answering > 0, failure is not None
            )
            if fails:  # all processes end here: none waits for the one that has
                raise failure or UserError("generation ended: a request of another process is bad")
            if not (reads or answers):
                return
            if answers:
                new = self._everywhere(self._answer())
                self._drafting.end_step(new)
                yield from new
            if reads:
                yield from self._everywhere(self._read_prompts())

    def _admit(self) -> Exception | None:
        """Give free rows to requests that wait; return what is wrong with the next one."""
        try:
            while len(self._rows) < self._settings.rows:
                following = next(self._waiting, None)
                if following is None:
                    return None
                number, request = following
                if max(request.prompt) >= self._vocab_size:
                    raise ValueError(
                        f"request {number} has token {max(request.prompt)}; the vocabulary ends at "
                        f"{self._vocab_size - 1}"
                    )
                self._rows.append(_Row(number, request))
                longest = len(request.prompt) + request.max_new_tokens
                self._model.clear(len(self._rows) - 1, longest)
        except Exception as error:
            return error
        return None

    def _of_pass(self, first: int, last: int) -> tuple[slice, list[_Row]]:
        """Return some rows of a pass, or the idle one where there are none."""
        if first < last:
            return slice(first, last), self._rows[first:last]
        self._model.clear(self._idle)
        return slice(self._idle, self._idle + 1), [_Row(_NOBODY, Request(prompt=[0]))]

    def _read_prompts(self) -> list[NewTokens]:
        """Read a piece of each prompt; give rows that are through with theirs a first token."""
        rows, reading = self._of_pass(self._answering, len(self._rows))
        had = self._model.lengths[rows]
        left = [len(row.tokens) - start for row, start in zip(reading, had, strict=True)]
        # No longer than the shortest prompt: the places behind its end would be for nothing.
        piece = min(max(min(left), SHORT_PIECE), PROMPT_CHUNK)
        counts = [min(one, piece) for one in left]
        width = max(counts)
        pieces = list(zip(reading, had, counts, strict=True))
        window = [_piece(row.tokens, start, count, width) for row, start, count in pieces]
        hidden = self._model.read(rows, window, counts)
        through = [
            place
            for place, (row, start, count) in enumerate(pieces)
            if start + count == len(row.tokens)
        ]
        new = []
        if through:
            ends = None if hidden is None else _at(hidden, through, counts)
            new = self._choose(ends, [reading[place] for place in through])
        if self._drafting.on:
            following = [
                _piece(row.tokens, start + 1, count, width) for row, start, count in pieces
            ]
            self._model.learn(rows, hidden, following, counts)
        if rows.start != self._idle:
            for place in through:  # they join those that answer
                self._swap(rows.start + place, self._answering)
                self._answering += 1
            self._leave()
        return new

    def _answer(self) -> list[NewTokens]:
        """Let each row that answers take a step: drafts that were right, and one token more."""
        rows, answering = self._of_pass(0, self._answering)
        length = self._drafting.start_step()
        drafts: list[list[int]] = [[] for _ in answering]
        if length:
            proposed = self._model.propose(rows, length, self._vocab_size)
            drafts = self._decided(proposed, (len(answering), length)).tolist()
        window = [[row.tokens[-1], *ahead] for row, ahead in zip(answering, drafts, strict=True)]
        hidden = self._model.read(rows, window, None if length else [1] * len(window))
        new = self._choose(hidden, answering, drafts)
        counts = [len(one.tokens) for one in new]
        if length:
            self._model.keep(counts)
        if self._drafting.on:
            following = [_padded(one.tokens, length + 1) for one in new]
            with self._drafting.learning():
                self._model.learn(rows, hidden, following, counts)
        if rows.start != self._idle:
            self._leave()
        return new

    def _choose(
        self, hidden: Tensor | None, rows: Sequence[_Row], drafts: Sequence[Sequence[int]] = ()
    ) -> list[NewTokens]:
        """Choose the tokens behind the last one of each row and behind its drafts.

        Args:
            hidden: of these tokens, [B, W, H], on the last pipeline stage.
            rows: B of them.
            drafts: of each row, W - 1; none is W = 1.
        """
        drafts = drafts or [[] for _ in rows]
        shape = (len(rows), len(drafts[0]) + 1)
        logits = chosen = None
        if hidden is not None:
            logits = self._model.logits(hidden)[..., : self._vocab_size]
            places = [
                place
                for row, ahead in zip(rows, drafts, strict=True)
                for place in row.places(ahead)
            ]
            chosen = choose(logits.flatten(0, 1), places).view(shape)
            chosen = chosen.where(logits.amax(-1).isfinite(), _NOT_FINITE)
        tokens = self._found_finite(rows, self._decided(chosen, shape))
        had = [len(row.tokens) for row in rows]
        judged = [row.take(*one) for row, *one in zip(rows, tokens, drafts, strict=True)]
        new = [row.tokens[start:] for row, start in zip(rows, had, strict=True)]
        log_probs = self._log_probs(logits, new, shape)
        return [
            NewTokens(
                request=row.number, tokens=one, log_probs=each, finish=row.finish, drafted=drafted,
                accepted=accepted,
            )
            for row, one, each, (drafted, accepted) in zip(
                rows, new, log_probs, judged, strict=True
            )
        ]  # fmt: skip

    def _found_finite(self, rows: Sequence[_Row], chosen: Tensor) -> list[list[int]]:
        """Return chosen tokens [B, W]; remember a choice among numbers that are none."""
        tokens: list[list[int]] = chosen.tolist()
        for row, one in zip(rows, tokens, strict=True):
            if _NOT_FINITE in one and row.number != _NOBODY:
                self._failure = UserError(
                    f"request {row.number}: logits behind token {len(row.tokens)} are not finite; "
                    "the weights of the model are damaged, or too large for its number format"
                )
        return [[max(token, 0) for token in one] for one in tokens]

    def _log_probs(
        self, logits: Tensor | None, new: Sequence[Sequence[int]], shape: tuple[int, int]
    ) -> list[list[float]]:
        """Return those of new tokens, of logits [B, W, V]; empty lists where none are wanted."""
        if not self._settings.log_probs:
            return [[] for _ in new]
        found = None
        if logits is not None:
            ids = torch.tensor([_padded(one, shape[1]) for one in new], device=logits.device)
            found = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        values = self._decided(found, shape, torch.float32).tolist()
        return [one[: len(tokens)] for one, tokens in zip(values, new, strict=True)]

    def _decided(
        self, known: Tensor | None, shape: tuple[int, int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Return what the last pipeline stage knows, on all ranks of the model alike.

        Tensor-parallel ranks may sum in another order, so the first one's word counts.
        """
        tensor, pipeline = self._groups.tp, self._groups.pp
        if tensor.size() == pipeline.size() == 1:
            assert known is not None, "one stage is the last one"
            return known
        if known is None:
            known = torch.empty(shape, dtype=dtype, device=self._model.device)
        elif tensor.size() > 1:
            known = known.contiguous()
            dist.broadcast(known, group=tensor, group_src=0)
        if pipeline.size() > 1:
            known = known.contiguous()
            dist.broadcast(known, group=pipeline, group_src=pipeline.size() - 1)
        return known

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._model.swap(one, other)
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    def _leave(self) -> None:
        """Let rows go that are over; the last ones take their places."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].finish is None:
                continue
            kept = self._model.bytes_of(place)
            self._record.cache_bytes = max(self._record.cache_bytes, kept)
            free = place
            if place < self._answering:
                self._answering -= 1
                free = self._put(self._answering, place)
            self._put(len(self._rows) - 1, free)
            self._rows.pop()

    def _put(self, source: int, target: int) -> int:
        """Move a row to a free place; return the place that is free now."""
        if source != target:
            self._model.move(source, target)
            self._rows[target] = self._rows[source]
        return source

    def _anywhere(self, *flags: bool) -> list[bool]:
        """Tell which flags are set on any data-parallel rank."""
        dp = self._groups.dp
        if dp.size() == 1:
            return list(flags)
        sums = torch.tensor(flags, dtype=torch.int32, device=self._model.device)
        dist.all_reduce(sums, group=dp)
        return (sums > 0).tolist()

    def _everywhere(self, new: list[NewTokens]) -> list[NewTokens]:
        """Return what all data-parallel ranks have found, without what nobody asked for."""
        dp = self._groups.dp
        new = [] if self._failure else new  # a token among them may be none
        parts: list[list[NewTokens]] = [new]
        if dp.size() > 1:
            parts = [[] for _ in range(dp.size())]
            dist.all_gather_object(parts, new, group=dp)
        return [one for part in parts for one in part if one.request != _NOBODY]


def _piece(tokens: Sequence[int], start: int, count: int, width: int) -> list[int]:
    """Cut some tokens out, and fill up what is not there."""
    return _padded(tokens[start : start + count], width)


def _padded(tokens: Sequence[int], width: int) -> list[int]:
    return [*tokens, *[0] * (width - len(tokens))]


def _at(hidden: Tensor, places: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Take the last kept token of some rows of a window: [B, W, H] -> [places, 1, H]."""
    last = [counts[place] - 1 for place in places]
    return hidden[list(places), last][:, None]
