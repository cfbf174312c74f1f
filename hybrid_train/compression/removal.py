"""How much a model loses where layers are taken out: one, one after the other, or a block of them.

    hidden_mse     mean over tokens and channels of (h - h')^2, h after the final norm, h' without
    hidden_nmse    sum of (h - h')^2 / sum of h^2
    logits_mse     the same of logits, whose differences are W (h - h'): no logits exist,
    logits_nmse    |W d|^2 = d^T (W^T W) d
    loss           nats per token more than the whole model has

Iterative: the layer whose loss costs least is taken out, then the next one of those that are left.

Sources: Minitron, arXiv:2407.14679 (perplexity); MiniPuzzle, Nemotron-H, arXiv:2504.03624 (MSE of
the last states); Nemotron Nano 2, arXiv:2508.14444 (iterative, logits); Nemotron Elastic,
arXiv:2511.16664 (normalized).

Dimensions: S tokens of a row on this rank, B rows of a microbatch, H hidden, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.anatomy.layers import main_layers
from hybrid_train.compression.activations import modules_of_layers
from hybrid_train.compression.passes import Passes, counted_tokens
from hybrid_train.compression.ranking import BLOCKS, LAYERS, NOT_MEASURED
from hybrid_train.data.batch import Batch
from hybrid_train.megatron import hybrid
from hybrid_train.megatron.hybrid import Head, Outputs
from hybrid_train.ops.logits import LabelScores
from hybrid_train.schema.importance import LayerMetric
from hybrid_train.schema.layer_ranges import layers_of_groups
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

Without = frozenset[int]  # main layers, from 1, that are taken out
# Sums over tokens of what a pass makes: (h - h')^2, (W (h - h'))^2, nats; tokens that count, and
# those with a label. Of the whole model h' is 0.
_HIDDEN, _LOGITS, _NATS, _TOKENS, _LABELS = range(5)


@contextlib.contextmanager
def without_layers(network: Network, model: Model, numbers: Collection[int]) -> Iterator[None]:
    """Let main layers, numbered from 1, hand on what they get."""
    with contextlib.ExitStack() as stack:
        for chunk in network.chunks:
            for layer, module in modules_of_layers(chunk, model):
                is_out = layer.depth == 0 and layer.number in numbers
                if is_out and not hybrid.is_skipped(module):
                    hybrid.skip(module)
                    stack.callback(hybrid.skip, module, skipped=False)
        yield


@dataclass
class LayerRemoval:
    """Runs a network over rows with and without layers.

    Attributes:
        passes: over the rows.
        model: of the network.
        rows: how many are read.
        accuracy: of the network as it is when this is called, on all processes; None: no task.
        together: neighbours that are taken out as one; each of them has the score of all.
    """

    passes: Passes
    model: Model
    rows: int
    accuracy: Callable[[], float] | None = None
    together: int = 1

    def scores(
        self, metrics: Sequence[LayerMetric], *, iterative: int, blocks: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return scores as a ranking names them; every process calls this.

        Args:
            metrics: that take layers out.
            iterative: how many layers, or groups of them that go together, are taken out one after
                the other, by each metric.
            blocks: lengths of blocks that are taken out as one, in layers or groups.

        Raises:
            UserError: on all processes, if a score is not finite.
        """
        if not metrics:
            return {}
        number = len(main_layers(self.model)) // self.together
        spans = [
            (first, first + length - 1)
            for length in sorted(set(blocks))
            for first in range(1, number - length + 2)
        ]
        single = [self._layers([one]) for one in range(1, number + 1)]
        of_blocks = [self._layers(range(first, last + 1)) for first, last in spans]
        values = self._values([*single, *of_blocks], metrics)
        found = {}
        for metric in metrics:
            by_layer = values[metric]
            found[LAYERS + metric.value] = self._of_each(torch.tensor(by_layer[:number]))
            if spans:
                table = torch.full((number * self.together,) * 2, NOT_MEASURED)
                for numbers, value in zip(of_blocks, by_layer[number:], strict=True):
                    table[min(numbers) - 1, max(numbers) - 1] = value
                found[BLOCKS + metric.value] = table
            if iterative:
                places = self._iterative(metric, iterative, by_layer[:number])
                found[f"{LAYERS}{metric.value}_iterative"] = self._of_each(places)
        return {name: scores.float() for name, scores in found.items()}

    def _layers(self, groups: Iterable[int]) -> Without:
        return frozenset(layers_of_groups(groups, self.together))

    def _of_each(self, scores: Tensor) -> Tensor:
        """Return scores of groups as scores of layers."""
        return scores.repeat_interleave(self.together)

    def _iterative(self, metric: LayerMetric, rounds: int, first: Sequence[float]) -> Tensor:
        """Return places in the order of removal, from 0; the layers that stay come behind."""
        left, gone = list(range(1, len(first) + 1)), list[int]()
        values = dict(zip(left, first, strict=True))
        for _ in range(min(rounds, len(left) - 1)):
            if gone:
                sets = [self._layers([*gone, one]) for one in left]
                found = self._values(sets, [metric])[metric]
                values = dict(zip(left, found, strict=True))
            worst = min(left, key=lambda one: (values[one], -one))  # of equal ones the first stays
            left.remove(worst)
            gone.append(worst)
        order = [*gone, *sorted(left, key=lambda one: (values[one], -one))]
        places = torch.empty(len(order))
        places[torch.tensor(order) - 1] = torch.arange(float(len(order)))
        return places

    def _values(
        self, sets: Sequence[Without], metrics: Sequence[LayerMetric]
    ) -> Mapping[LayerMetric, list[float]]:
        """Return what each metric says of the network without each set of layers."""
        found: dict[LayerMetric, list[float]] = {}
        by_pass = [one for one in metrics if one is not LayerMetric.accuracy]
        if by_pass:
            *rows, whole = self._sums(sets, set(by_pass))
            found = {one: [self._value(one, row, whole) for row in rows] for one in by_pass}
        if LayerMetric.accuracy in metrics:
            assert self.accuracy is not None, "nobody says how accuracy is measured"
            best = self.accuracy()
            found[LayerMetric.accuracy] = [best - self._accuracy_without(one) for one in sets]
        for metric, values in found.items():
            _require_finite(metric, sets, values)
        return found

    def _accuracy_without(self, numbers: Without) -> float:
        assert self.accuracy is not None
        with without_layers(self.passes.network, self.model, numbers):
            return self.accuracy()

    def _value(self, metric: LayerMetric, row: Sequence[float], whole: Sequence[float]) -> float:
        """Return a metric of the sums without layers, and of those of the whole model."""
        tokens, labels = max(1.0, whole[_TOKENS]), max(1.0, whole[_LABELS])
        if metric is LayerMetric.hidden_mse:
            return row[_HIDDEN] / (tokens * self.model.hidden_size)
        if metric is LayerMetric.hidden_nmse:
            return _ratio(row[_HIDDEN], whole[_HIDDEN])
        if metric is LayerMetric.logits_mse:
            return row[_LOGITS] / (tokens * self.passes.network.vocab_size)
        if metric is LayerMetric.logits_nmse:
            return _ratio(row[_LOGITS], whole[_LOGITS])
        return (row[_NATS] - whole[_NATS]) / labels

    def _sums(self, sets: Sequence[Without], metrics: Collection[LayerMetric]) -> list[list[float]]:
        """Return the sums over all rows without each set of layers, and at last with all layers."""
        network = self.passes.network
        total = torch.zeros(len(sets) + 1, 5, dtype=torch.float64, device=network.device)
        reader = _Reader(network, metrics)
        for batches in self.passes.groups(self.rows):
            reader.forget()
            for place in (len(sets), *range(len(sets))):  # the whole model goes ahead
                numbers = sets[place] if place < len(sets) else Without()
                with without_layers(network, self.model, numbers):
                    reports = self.passes.run(batches, reader.read)
                for (sums,) in reports:
                    total[place] += sums
        dist.all_reduce(total)
        return [[float(one) for one in row] for row in total.cpu()]


def _ratio(error: float, whole: float) -> float:
    return error / whole if whole else math.nan


class _Reader:
    """Compares what passes end in with what the first pass of the same microbatch ended in."""

    def __init__(self, network: Network, metrics: Collection[LayerMetric]) -> None:
        self._groups = network.groups
        of_logits = {LayerMetric.logits_mse, LayerMetric.logits_nmse}
        self._with_logits = not of_logits.isdisjoint(metrics)
        self._with_loss = LayerMetric.loss in metrics
        self._whole: dict[int, Tensor] = {}
        self._gram: Tensor | None = None

    def forget(self) -> None:
        """Begin with other microbatches."""
        self._whole.clear()

    def read(self, outputs: Outputs, batch: Batch) -> tuple[Tensor]:
        """Return the sums of a microbatch that this process speaks for, [5], float64."""
        counted = counted_tokens(batch)
        labelled = (batch.loss_weights.t() > 0) & counted
        sums = torch.zeros(5, dtype=torch.float64, device=counted.device)
        is_first = self._groups.tp.rank() == 0
        hidden = outputs.hidden.float()
        is_split = len(hidden) < len(counted)
        own = counted.chunk(self._groups.tp.size())[self._groups.tp.rank()] if is_split else counted
        apart = hidden - self._whole[id(batch)] if id(batch) in self._whole else hidden
        self._whole.setdefault(id(batch), hidden)
        gram = self._gram_of(outputs.head) if self._with_logits else None
        if is_split or is_first:
            apart = apart[own]
            sums[_HIDDEN] = apart.square().sum(dtype=torch.float64)
            if gram is not None:
                sums[_LOGITS] = ((apart @ gram) * apart).sum(dtype=torch.float64)
        if self._with_loss:
            nats = self._nats(outputs, batch, labelled)
            sums[_NATS] = nats if is_first else 0
        if is_first:
            sums[_TOKENS], sums[_LABELS] = counted.sum(), labelled.sum()
        return (sums,)

    @staticmethod
    def _nats(outputs: Outputs, batch: Batch, labelled: Tensor) -> Tensor:
        places = labelled.flatten().nonzero().squeeze(1)
        labels = batch.labels.t().flatten()[places]
        values = outputs.head.read(outputs.hidden, LabelScores(labels), places)
        return -values[:, 0].sum(dtype=torch.float64)

    def _gram_of(self, head: Head) -> Tensor:
        """Return W^T W of the rows of the head that are tokens, [H, H]."""
        if self._gram is None:
            part = head.part
            rows = part.weight[: part.width].float()
            self._gram = part.summed(rows.t() @ rows)
        return self._gram


def _require_finite(metric: LayerMetric, sets: Sequence[Without], values: Sequence[float]) -> None:
    """Refuse scores that are no numbers.

    Raises:
        UserError: on all processes.
    """
    for numbers, value in zip(sets, values, strict=True):
        if not math.isfinite(value):
            named = ", ".join(map(str, sorted(numbers)))
            error = UserError(
                f"{metric.value} without layer {named} is not finite: the model has weights that "
                "are not, or numbers that overflow; take an earlier checkpoint"
            )
            error.on_all_ranks = True
            raise error
