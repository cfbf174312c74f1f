"""Layers taken out: scores are those of real logits, the order is that of trying all."""

import itertools
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_train.compression.ranking import BLOCKS, LAYERS
from hybrid_train.data.batch import stack
from hybrid_train.schema.importance import LayerMetric
from hybrid_train.schema.problems import UserError
from tests.scored import frozen_network, passes_of, whole_rows
from tests.tiny import MEGATRON_WARNINGS, VOCAB, alone, tiny_job

pytestmark = MEGATRON_WARNINGS
METRICS = [one for one in LayerMetric if one not in (LayerMetric.cosine, LayerMetric.accuracy)]
NUMBER, ROUNDS, LENGTHS = 6, 3, [2, 4]


class Tried:
    """A tiny model, its scores, and the same by running it."""

    def __init__(self) -> None:
        from hybrid_train.compression.removal import LayerRemoval

        with alone() as groups:
            tiny = tiny_job()
            self.network, self.model = frozen_network(tiny, groups), tiny.model
            rows = whole_rows(3)
            self.batch = stack(rows)
            removal = LayerRemoval(passes_of(self.network, rows, 2), self.model, 3)
            self.scores = removal.scores(METRICS, iterative=ROUNDS, blocks=LENGTHS)
            sets = [(), *itertools.combinations(range(1, NUMBER + 1), 1)]
            sets += [tuple(range(a, a + n)) for n in LENGTHS for a in range(1, NUMBER - n + 2)]
            sets += [one for n in (2, 3) for one in itertools.combinations(range(1, NUMBER + 1), n)]
            self.outputs = {frozenset(one): self._outputs(one) for one in sets}

    def _outputs(self, numbers: Collection[int]) -> tuple[Tensor, Tensor]:
        from hybrid_train.compression.removal import without_layers

        def read(out: Any) -> tuple[Tensor, Tensor]:
            return out.hidden.double(), out.logits()[..., :VOCAB].double()

        with torch.no_grad(), without_layers(self.network, self.model, numbers):
            found: tuple[Tensor, Tensor] = self.network.chunks[0](self.batch.tokens, read=read)
        return found

    def score(self, metric: LayerMetric, numbers: Collection[int]) -> float:
        """What a metric says of the model without layers."""
        pairs = zip(self.outputs[frozenset()], self.outputs[frozenset(numbers)], strict=True)
        hidden, logits = pairs
        if metric is LayerMetric.loss:
            labels = self.batch.labels.flatten()
            whole, rest = (functional.cross_entropy(one.flatten(0, 1), labels) for one in logits)
            return float(rest - whole)
        whole, rest = hidden if metric.value.startswith("hidden") else logits
        error = (rest - whole).square().sum()
        is_mse = metric in (LayerMetric.hidden_mse, LayerMetric.logits_mse)
        return float(error / (whole.numel() if is_mse else whole.square().sum()))


@pytest.fixture(scope="module")
def tried() -> Tried:
    return Tried()


@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_is_scored_by_what_the_model_makes_without_it(
    metric: LayerMetric, tried: Tried
) -> None:
    wanted = [tried.score(metric, [one]) for one in range(1, NUMBER + 1)]
    found = tried.scores[LAYERS + metric.value]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_the_lengths_asked_for_are_scored_and_no_others(
    metric: LayerMetric, tried: Tried
) -> None:
    found = tried.scores[BLOCKS + metric.value]
    for first, last in itertools.product(range(1, NUMBER + 1), repeat=2):
        score = found[first - 1, last - 1]
        if last - first + 1 in LENGTHS:
            wanted = torch.tensor(tried.score(metric, range(first, last + 1)))
            torch.testing.assert_close(score, wanted, rtol=1e-4, atol=2e-6)
        else:
            assert score == torch.finfo(torch.float32).max  # nobody takes it for the least


@pytest.mark.parametrize("metric", METRICS)
def test_iterative_removal_takes_the_cheapest_of_those_that_are_left(
    metric: LayerMetric, tried: Tried
) -> None:
    gone: list[int] = []
    for _ in range(ROUNDS):
        left = [one for one in range(1, NUMBER + 1) if one not in gone]
        gone.append(min(left, key=lambda one: tried.score(metric, [*gone, one])))
    places = tried.scores[f"{LAYERS}{metric.value}_iterative"]
    assert [int(one) for one in places.argsort()[:ROUNDS]] == [one - 1 for one in gone]
    assert sorted(places.tolist()) == list(range(NUMBER))


def test_accuracy_is_that_of_the_network_as_it_is_then() -> None:
    from hybrid_train.compression.removal import LayerRemoval
    from hybrid_train.megatron.hybrid import is_skipped

    with alone() as groups:
        tiny = tiny_job("M-*")
        network = frozen_network(tiny, groups)
        layers = network.chunks[0].decoder.layers

        def accuracy() -> float:  # that says which layers are there
            there = [one for one, layer in enumerate(layers) if not is_skipped(layer)]
            return sum(0.1 * 2**one for one in there)

        passes = passes_of(network, whole_rows(2))
        removal = LayerRemoval(passes, tiny.model, 2, accuracy)
        found = removal.scores([LayerMetric.accuracy], iterative=0, blocks=[])
    torch.testing.assert_close(found[LAYERS + "accuracy"], torch.tensor([0.1, 0.2, 0.4]))


def test_neighbours_that_go_together_are_taken_out_and_counted_as_one() -> None:
    from hybrid_train.compression.removal import LayerRemoval
    from hybrid_train.megatron.hybrid import is_skipped

    with alone() as groups:
        tiny = tiny_job("*-*-*-")
        network = frozen_network(tiny, groups)
        layers = network.chunks[0].decoder.layers

        def accuracy() -> float:  # that says which layers are there
            return sum(0.01 * 2**n for n, one in enumerate(layers) if not is_skipped(one))

        passes = passes_of(network, whole_rows(2))
        removal = LayerRemoval(passes, tiny.model, 2, accuracy, together=2)
        found = removal.scores([LayerMetric.accuracy], iterative=1, blocks=[2])
    of_groups = torch.tensor([0.03, 0.03, 0.12, 0.12, 0.48, 0.48])
    torch.testing.assert_close(found[LAYERS + "accuracy"], of_groups)
    assert found[f"{LAYERS}accuracy_iterative"].tolist() == [0, 0, 1, 1, 2, 2]
    table = found[BLOCKS + "accuracy"]
    torch.testing.assert_close(table[[0, 2], [3, 5]], torch.tensor([0.15, 0.60]))
    assert int((table < torch.finfo(torch.float32).max).sum()) == 2, "none begins inside a group"


def test_a_model_that_is_no_number_is_refused_by_the_metric() -> None:
    from hybrid_train.compression.removal import LayerRemoval

    with alone() as groups:
        tiny = tiny_job("M-")
        network = frozen_network(tiny, groups)
        network.chunks[0].decoder.final_norm.weight.data[3] = torch.inf
        removal = LayerRemoval(passes_of(network, whole_rows(2)), tiny.model, 2)
        with pytest.raises(UserError, match="hidden_mse without layer 1 is not finite") as caught:
            removal.scores([LayerMetric.hidden_mse], iterative=0, blocks=[])
    assert caught.value.on_all_ranks


def test_of_layers_that_cost_the_same_the_first_stay() -> None:
    from hybrid_train.compression.removal import LayerRemoval

    with alone() as groups:
        tiny = tiny_job("M-*")
        passes = passes_of(frozen_network(tiny, groups), whole_rows(2))
        removal = LayerRemoval(passes, tiny.model, 2, accuracy=lambda: 0.5)
        found = removal.scores([LayerMetric.accuracy], iterative=1, blocks=[])
    assert found[f"{LAYERS}accuracy_iterative"].tolist() == [2, 1, 0]
