"""How many tokens the MTP block drafts ahead, and what becomes of them."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from hybrid_train.generation.requests import NewTokens
from hybrid_train.megatron.hybrid import mtp_blocks
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

LENGTHS = (0, 1, 2, 3, 5, 7)  # that `auto` chooses from
_TRIED_FIRST = (0, 1, 3)
_TRIALS = 12  # steps of each, as a single row needs them to tell what is accepted
_TRIALS_AGAIN = 4  # of lengths near the best, now and then
_EVERY = 64  # steps between trials
_KEPT = 8  # latest durations of each length
_PATIENCE = 3  # times that no drafts are the best choice before they are over for good
_OFF = -1
_MARGIN = 1.05  # that drafts must promise over none: trials take time, and rows end within drafts
_HOPELESS = 0.8  # of the tokens a second without drafts: they are over at once


@dataclass
class Record:
    """What was drafted and accepted.

    Attributes:
        row_steps: steps of single rows of which all drafts were judged.
        tokens: that these steps added, the verifier's own ones counted.
        drafted: drafts that were right or wrong, by their place ahead, from 0.
        accepted: of these.
        lengths: how many steps had drafts of each length.
        cache_bytes: that the layers of this process kept of the longest text so far.
    """

    row_steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens of a step with drafts, the verifier's own one counted; from 1 to drafts + 1."""
        return self.tokens / self.row_steps if self.row_steps else 1.0

    @property
    def shares(self) -> list[float]:
        """Share of drafts at each place that were accepted with all those before them."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return [accepted / max(drafted, 1) for accepted, drafted in pairs]

    def count(self, length: int, new: Sequence[NewTokens]) -> None:
        """Add a step in which rows drafted `length` tokens."""
        self.lengths[length] = self.lengths.get(length, 0) + 1
        missing = [0] * (length - len(self.drafted))
        self.drafted += missing
        self.accepted += missing
        for one in new:
            if length and one.drafted == length:
                self.row_steps += 1
                self.tokens += one.accepted + 1
            for place in range(one.drafted):
                self.drafted[place] += 1
                self.accepted[place] += place < one.accepted


class Drafting:
    """The length of drafts: fixed, or the one with the most tokens a second."""

    def __init__(self, network: Network, wanted: int | None, record: Record) -> None:
        """Begin.

        Args:
            network: the model, under any layout.
            wanted: tokens of each draft; None: as many as pay.
            record: where steps are counted.

        Raises:
            UserError: if drafts are wanted of a model that has no block for them.
        """
        self._groups, self._device = network.groups, network.device
        self._record = record
        self._wanted = wanted
        self._seconds: dict[int, deque[float]] = {}
        self._plan: deque[int] = deque(length for length in _TRIED_FIRST for _ in range(_TRIALS))
        self._best = 0
        self._length = self._steps = self._useless = 0
        self._began = self._learning_s = 0.0
        depths, repeated = mtp_blocks(network.chunks)
        self.on = wanted != 0 and depths > 0
        if wanted and not depths:
            raise UserError(
                f"drafts = {wanted}: the model has no MTP block that could draft; set drafts=0"
            )
        self._limit = max(LENGTHS) if repeated or depths == 1 else 1
        if wanted and wanted > self._limit and not (repeated or depths == 1):
            raise UserError(
                f"drafts = {wanted}: the {depths} MTP blocks of the model have weights of their "
                "own, and the first alone can draft; set drafts=1"
            )

    def start_step(self) -> int:
        """Return how many tokens each row drafts in this step."""
        if not self.on:
            self._length = 0
        elif self._wanted is not None:
            self._length = self._wanted
        else:
            length = self._agreed(self._next())
            self.on, self._length = length != _OFF, max(length, 0)
        self._began, self._learning_s = time.perf_counter(), 0.0
        return self._length

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Take the time in which the block reads true states: without drafts there is none."""
        start = time.perf_counter()
        yield
        self._learning_s += time.perf_counter() - start

    def end_step(self, new: Sequence[NewTokens]) -> None:
        """Note what this step has added to each row."""
        self._record.count(self._length, new)
        if self.on and self._wanted is None:
            seconds = time.perf_counter() - self._began
            seconds -= 0 if self._length else self._learning_s
            self._seconds.setdefault(self._length, deque(maxlen=_KEPT)).append(seconds)
            self._steps += 1

    def _next(self) -> int:
        """Choose: what is still to be tried, else the length that promises most tokens a second.

        Where drafts have not paid for long, or are far from it, the block does not even read on.
        """
        if not self._plan and self._hopeless():
            return _OFF
        if not self._plan and self._steps % _EVERY == 0:
            self._best = self._promising()
            self._useless = 0 if self._best else self._useless + 1
            if self._useless == _PATIENCE:
                return _OFF
            place = LENGTHS.index(self._best)
            near = {0, *LENGTHS[max(place - 1, 0) : place + 2]} if place else {*_TRIED_FIRST}
            self._plan.extend(sorted(near - {self._best}) * _TRIALS_AGAIN)
        if self._plan:
            return min(self._plan.popleft(), self._limit)
        self._best = self._promising()
        return self._best

    def _promising(self) -> int:
        """Return the length with the most tokens a second, by what has been measured."""
        rates = self._rates()
        return max(rates, key=lambda length: rates[length] * (1 if length else _MARGIN))

    def _hopeless(self) -> bool:
        """Tell whether every length of drafts is far slower than none."""
        rates = self._rates()
        return max(rate for length, rate in rates.items() if length) < _HOPELESS * rates[0]

    def _rates(self) -> dict[int, float]:
        """Return tokens a second of a row with drafts of each length that was tried."""
        shares = self._record.shares
        return {
            length: (1 + sum(shares[:length])) / statistics.median(kept)
            for length, kept in self._seconds.items()
        }

    def _agreed(self, value: int) -> int:
        """Return what the last stage of the first ranks says: clocks differ."""
        found = torch.tensor([value], device=self._device)
        groups = self._groups
        for group, source in ((groups.tp, 0), (groups.dp, 0), (groups.pp, groups.pp.size() - 1)):
            if group.size() > 1:
                dist.broadcast(found, group=group, group_src=source)
        return int(found)
