"""Log-probabilities of given texts under any layout, in packed rows, by the passes of validation.

Documents of a row do not see each other, so each text is scored as it would be alone, up to
rounding. (Formats that scale whole tensors, as FP8 does, round by what else is in the batch.)

Dimensions: B rows of a microbatch, L places of a row, S of them on this context-parallel rank, N
scored tokens of all texts, K values of each. A text of n tokens takes n - 1 places: each predicts
the token behind it.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.data.batch import Batch, Row, stack
from hybrid_train.data.packing import best_fit, fill_row
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.megatron.hybrid import Outputs
from hybrid_train.model.quantized import unwrapped
from hybrid_train.ops.divergence import Comparison
from hybrid_train.ops.logits import HeadPart, LabelScores
from hybrid_train.ops.reference import Reference
from hybrid_train.runtime import heartbeat
from hybrid_train.schema.model import RopeScaling
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

_SLOT = "slot"  # of a place: the number of the token that it predicts among the N, or none
_NONE = -1
_LEAST_STEP = 16  # places; rows are a multiple of it
_AT_ONCE = 4  # microbatches of a stage whose hidden states wait for those of another model
_Others = Mapping[int, Sequence[tuple[int, int]]]  # slot -> further labels there, and their slots
_STEPS = 8  # lengths of rows lie at most an eighth of the next power of two apart


@dataclass(frozen=True)
class Text:
    """What is scored: the tokens from `start` on, each given all before it.

    Attributes:
        tokens: ids.
        start: position of the first scored token, from 1; nothing stands before the token at 0. At
            the length of the text nothing is scored.
    """

    tokens: Sequence[int]
    start: int = 1

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Scores:
    """What a model says of one text, of each scored token in order; on the CPU.

    Attributes:
        log_probs: of the token given those before it, nats, float32.
        greedy: whether it is the most likely one, the first of equals, bool.
        entropy: of the distribution that it is drawn from, nats, float32; None: not asked for.
        divergence: KL(against || model) of this distribution, nats, float32; None: not asked for.
        agrees: whether both models hold the same token for the most likely one, bool; likewise.
    """

    log_probs: Tensor
    greedy: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    agrees: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The rows that texts are packed into.

    Attributes:
        length: places of a row; a longer text has a longer row of its own.
        tokens: places of a microbatch of one data-parallel rank; it has one row at least. Few fit
            into the caches of a CPU; a GPU takes many at once.
    """

    length: int = 1024
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.length < 1 or self.tokens < 1:
            raise ValueError(f"rows of {self.length} places, {self.tokens} tokens: need 1 or more")


def score(
    network: Network,
    texts: Sequence[Text],
    *,
    rows: Rows = Rows(),
    entropy: bool = False,
    against: Network | None = None,
) -> list[Scores]:
    """Score texts; every process of the layout calls this with the same texts.

    Texts that are equal, but for their last token perhaps, are read once. The network may be in
    training: it comes back in its mode, and training goes on as if nothing had been. No logits of
    more than a chunk of scored tokens exist, and none of a vocabulary that tensor ranks share.

    Args:
        network: under any layout, trained or frozen.
        texts: of any lengths.
        rows: how they are packed; changes speed and memory alone.
        entropy: whether the entropies are wanted, too.
        against: another model under the same layout that the distributions are compared with.

    Returns:
        The scores of each text, in the order given, the same on every process.

    Raises:
        ValueError: if a text has no token, a start that it does not have, or a token that the model
            does not know; if the model that it is compared with has another vocabulary.
        UserError: if a score is not a finite number, as of a model that has diverged.
    """
    require_sound(texts, network.vocab_size)
    before = heartbeat.last().part
    heartbeat.enter(heartbeat.VALIDATION)
    read, spans, others = _read_once(texts)
    readers = _Readers(entropy, against, others)
    count = sum(text.scored for text in texts)
    found = torch.zeros(count, readers.num_values, device=network.device)
    if len(found):
        with readers.evaluating(network):
            for batches in _microbatches(network, read, rows, _border(network, against)):
                _write(network, found, readers.run(network, batches))
        dist.all_reduce(found)
    heartbeat.enter(before)
    values = found.cpu()
    by_text = [values[span] for span in spans]
    require_finite(by_text)
    return [readers.scores(one) for one in by_text]


def _read_once(texts: Sequence[Text]) -> tuple[list[Text], list[slice], _Others]:
    """Find texts that differ by their last token at most, which no place sees.

    Returns:
        One text of each kind; the slots of each given text, those of the first ones in front, in
        their order; and which further labels, with their slots, a place of these is scored for.
    """
    kinds: dict[tuple[int, tuple[int, ...]], int] = {}
    kind_of = [
        kinds.setdefault((text.start, tuple(text.tokens[:-1])), len(kinds)) for text in texts
    ]
    read: list[Text] = []
    for text, kind in zip(texts, kind_of, strict=True):
        if kind == len(read):
            read.append(text)
    begins = np.cumsum([0, *(text.scored for text in read)]).tolist()
    free, spans, others = begins[-1], [], defaultdict(list)
    for text, kind in zip(texts, kind_of, strict=True):
        begin = begins[kind]
        if text is not read[kind]:
            for number, token in enumerate(text.tokens[text.start :]):
                others[begin + number].append((token, free + number))
            begin, free = free, free + text.scored
        spans.append(slice(begin, begin + text.scored))
    return read, spans, others


# (what a last stage makes of a microbatch, places of scored tokens, labels) -> their values.
_Read = Callable[[Outputs, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Readers:
    """What is read of each scored token: of one model, or also of both together."""

    entropy: bool
    against: Network | None
    others: _Others

    @property
    def num_values(self) -> int:
        return 2 + self.entropy + 2 * (self.against is not None)

    def scores(self, values: Tensor) -> Scores:
        """Return the scores of a text of its values, [tokens, K]."""
        columns = [one.clone() for one in values.unbind(-1)]
        both = [columns[-2], columns[-1] == 1] if self.against is not None else []
        return Scores(columns[0], columns[1] == 1, columns[2] if self.entropy else None, *both)

    @contextlib.contextmanager
    def evaluating(self, network: Network) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in (network, *([] if self.against is None else [self.against])):
                stack.enter_context(one.evaluating())
            yield

    def run(self, network: Network, batches: list[Batch]) -> list[dict[str, Tensor]]:
        """Run microbatches of one shape; return slots and values of each, on a last stage."""
        if self.against is None:
            return _run(network, batches, self._own, self.others)
        # The hidden states of one model wait for those of the other, few microbatches at a time.
        step = _AT_ONCE * network.passes_multiple * network.groups.pp.size()
        parts = [batches[first : first + step] for first in range(0, len(batches), step)]
        return [report for part in parts for report in self._compared(network, part)]

    def _own(self, outputs: Outputs, places: Tensor, labels: Tensor) -> Tensor:
        reading = LabelScores(labels, with_entropy=self.entropy)
        return outputs.head.read(outputs.hidden, reading, places)

    def _compared(self, network: Network, batches: list[Batch]) -> list[dict[str, Tensor]]:
        """Run the other model, then this one, which reads what the other has made."""
        heads: list[HeadPart] = []

        def hidden(outputs: Outputs, places: Tensor, _: Tensor) -> Tensor:
            heads.append(outputs.head.part)
            return heads[-1].gathered(outputs.hidden)[places]

        assert self.against is not None
        reports = _run(self.against, batches, hidden, self.others)
        pairs = zip([one["values"] for one in reports], heads, strict=True)

        def both(outputs: Outputs, places: Tensor, labels: Tensor) -> Tensor:
            reading = Comparison(Reference(*next(pairs)))
            values = outputs.head.read(outputs.hidden, reading, places)
            return torch.cat([self._own(outputs, places, labels), values], dim=-1)

        return _run(network, batches, both, self.others)


def _run(
    network: Network, batches: list[Batch], read: _Read, others: _Others
) -> list[dict[str, Tensor]]:
    """Run microbatches of one shape; return slots and values of each, on a last stage."""

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        heartbeat.enter(heartbeat.last().part)  # still there
        batch = next(iterator)
        slots = batch.token_extras[_SLOT].t().flatten()  # sequence before batch, as hidden states
        places = (slots != _NONE).nonzero().squeeze(1)
        labels, slots = batch.labels.t().flatten()[places], slots[places]
        if others:
            more = [
                (place, token, slot)
                for place, first in zip(places.tolist(), slots.tolist(), strict=True)
                for token, slot in others.get(first, ())
            ]
            added = places.new_tensor(more).view(-1, 3).unbind(1)
            places, labels, slots = map(torch.cat, zip((places, labels, slots), added, strict=True))
        output = model(  # no positions: MTP layers are not run
            batch.tokens,
            sequence_index=batch.sequence_index,
            padding=batch.padding,
            read=lambda outputs: read(outputs, places, labels),
        )
        return output, _reporter(slots)

    rows, length = batches[0].tokens.shape
    return run_schedule(
        network.chunks,
        forward_step,
        [network.own(batch) for batch in batches],
        shape=(rows, length),
        forward_only=True,
    )


def _write(network: Network, found: Tensor, reports: list[dict[str, Tensor]]) -> None:
    """Write values to their slots of [N, K]; each token is written by one process."""
    if network.groups.tp.rank() == 0:
        for report in reports:
            found[report["slots"]] = report["values"]


def _reporter(slots: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Return Megatron's loss function: no loss, no tokens that divide it, but a report."""

    def report(values: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        none = values.new_zeros(())
        return none, none.int(), {"slots": slots, "values": values}

    return report


def border_of(network: Network) -> int | None:
    """Return the length of the longest row that takes the short factors of longrope; None: all."""
    chunk: Any = unwrapped(network.chunks[0])
    rope = chunk.rope
    is_long = rope is not None and rope.scaling is RopeScaling.longrope
    return rope.original_length if is_long else None


def _border(*networks: Network | None) -> int | None:
    """Return the least of the borders of some networks."""
    borders = [border_of(one) for one in networks if one is not None]
    return min((one for one in borders if one is not None), default=None)


def _microbatches(
    network: Network, texts: Sequence[Text], rows: Rows, border: int | None
) -> Iterator[list[Batch]]:
    """Yield the microbatches of this data-parallel rank, those of one shape together.

    All ranks get equally many, which they need to meet in collectives; rows without a text fill up.

    Args:
        network: that reads them.
        texts: all.
        rows: how they are packed.
        border: places of a row that what it holds must not pass by packing or padding alone: a
            longer one takes other factors of longrope than its texts alone.
    """
    rank, ranks = network.groups.dp.rank(), network.groups.dp.size()
    slots = np.cumsum([0, *(text.scored for text in texts)])
    by_length = defaultdict(list)
    most_places = rows.length if border is None else min(rows.length, border)
    for row in _packed(texts, most_places, ranks):
        used = sum(len(texts[number].tokens) - 1 for number in row)
        length = _padded(used, unit := _unit(network))
        if border is not None and used <= border < length:
            length = used + -used % unit
        by_length[length].append(row)
    for length, alike in sorted(by_length.items(), reverse=True):
        most = max(1, rows.tokens // length)
        passes = -(-len(alike) // (ranks * most))
        passes += -passes % network.passes_multiple
        size = -(-len(alike) // (ranks * passes))
        alike += [[]] * (ranks * passes * size - len(alike))
        own = alike[rank::ranks]
        filled = [_row([(texts[n], int(slots[n])) for n in row], length) for row in own]
        yield [stack(filled[first : first + size]) for first in range(0, len(filled), size)]


def _packed(texts: Sequence[Text], length: int, ranks: int) -> list[list[int]]:
    """Return the numbers of the texts of each row; texts without a scored token have none.

    Rows are shorter where the data-parallel ranks would not get one each.
    """
    numbers = np.array([n for n, text in enumerate(texts) if text.scored], dtype=np.int64)
    places = np.array([len(texts[n].tokens) - 1 for n in numbers], dtype=np.int64)
    fits = places <= length
    shared = places[fits]
    if shared.size:
        length = min(length, max(int(shared.max()), -(-int(shared.sum()) // ranks)))
    packed: Mapping[int, list[int]] = defaultdict(list)
    for number, row in zip(numbers[fits].tolist(), best_fit(shared, length).tolist(), strict=True):
        packed[row].append(number)
    return [[number] for number in numbers[~fits].tolist()] + list(packed.values())


def _row(texts: Sequence[tuple[Text, int]], length: int) -> Row:
    """Put texts, each with the slot of its first scored token, into a row of so many places."""
    parts = [np.asarray(text.tokens, dtype=np.int64) for text, _ in texts]
    fields: dict[str, Any] = fill_row(parts, length, pad_id=0)
    slot = np.full(length, _NONE)
    end = 0
    for text, first in texts:
        end += len(text.tokens) - 1
        slot[end - text.scored : end] = np.arange(first, first + text.scored)
    fields["loss_weights"] = (slot != _NONE).astype(np.float32)
    return Row(**fields, token_extras={_SLOT: slot})


def _unit(network: Network) -> int:
    """Return what the length of a row is a multiple of, so that its ranks can share it."""
    context, tensor = network.groups.cp.size(), network.groups.tp.size()
    return int(np.lcm(_LEAST_STEP, (2 * context if context > 1 else 1) * tensor))


def _padded(used: int, unit: int) -> int:
    """Return the length of a row with so many places used: few lengths, little padding."""
    step = max(unit, (1 << (used - 1).bit_length()) // _STEPS)
    step += -step % unit
    return used + -used % step


def require_sound(texts: Sequence[Text], vocab_size: int) -> None:
    """Refuse texts that cannot be scored.

    Raises:
        ValueError: see `score`.
    """
    for number, text in enumerate(texts):
        tokens = np.asarray(text.tokens)
        if not len(tokens) or not 1 <= text.start <= len(tokens):
            raise ValueError(
                f"text {number} has {len(tokens)} tokens and start = {text.start}: needs at least "
                "one token, and a start from 1 to their number"
            )
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise ValueError(
                f"text {number} has token {wrong}, but the vocabulary of the model is 0 to "
                f"{vocab_size - 1}"
            )


def require_finite(by_text: Sequence[Tensor]) -> None:
    """Refuse scores that are no numbers.

    Args:
        by_text: values of the scored tokens of each text, [n, K].

    Raises:
        UserError: on all processes.
    """
    for number, one in enumerate(by_text):
        if not one.isfinite().all():
            error = UserError(
                f"text {number} has a log-probability that is not finite: the model has weights "
                "that are not, or numbers that overflow; take an earlier checkpoint"
            )
            error.on_all_ranks = True
            raise error
