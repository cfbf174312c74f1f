"""The objective: what is counted, what divides what."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid_train.data.batch import Batch
from hybrid_train.schema import objective as settings
from hybrid_train.schema.model import Model
from tests.packed import documents, packed_batch
from tests.tiny import BATCH, LENGTH, MEGATRON_WARNINGS, batch_of, some_rows

if TYPE_CHECKING:
    from hybrid_train.megatron.hybrid import Head

pytestmark = MEGATRON_WARNINGS
DEPTHS, SCALE = 2, 0.3


def objective(groups: Any, depths: int = DEPTHS) -> Any:
    from hybrid_train.training.next_token import NextToken

    model = Model(pattern="/".join(["M", *["*"] * depths]))
    given = SimpleNamespace(model=model, groups=groups)
    return NextToken(settings.NextToken(mtp_loss_scale=SCALE), given)


class GivenLosses(torch.nn.Module):
    """A model whose losses are known, and its head: of each row of tokens those at its place."""

    def __init__(self, losses: Tensor) -> None:
        super().__init__()
        self.losses = losses  # [1 + D, B, S]

    def forward(self, tokens: Tensor, *_: object, read: Any, **__: object) -> Any:
        from hybrid_train.megatron.hybrid import Outputs

        first, *others = self.losses[:, tokens[:, 0]]
        return read(Outputs(first, tuple(others), cast("Head", self)))

    def weighted_sum(self, hidden: Tensor, _: object, weights: Tensor) -> tuple[Tensor, Tensor]:
        return (hidden * weights).sum(), hidden


def numbered(masks: Tensor) -> list[Batch]:
    """One microbatch for each row of the mask; its tokens say which row it is."""
    rows = torch.arange(len(masks)).unsqueeze(1).expand(-1, LENGTH + 1)
    return [batch_of(rows[i : i + 1], masks[i : i + 1]) for i in range(len(masks))]


def shifted(mask: Tensor, by: int) -> Tensor:
    """Depth k looks at the label k places further; behind the last one there is none."""
    return pad(mask[:, by:], (0, by))


def masks() -> Tensor:
    mask = (torch.rand(BATCH, LENGTH) < 0.6).float()
    mask[2] = 0
    return mask


def test_every_depth_counts_its_own_valid_labels(groups: Any) -> None:
    mask = masks()
    counts = objective(groups).count(numbered(mask))
    assert counts.tolist() == [shifted(mask, depth).sum().item() for depth in range(1 + DEPTHS)]


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_sum_over_microbatches_is_the_loss_of_the_whole_batch(groups: Any, depths: int) -> None:
    mask = masks()
    losses = torch.rand(1 + depths, BATCH, LENGTH, dtype=torch.float64)
    of = objective(groups, depths)
    batches = numbered(mask)
    totals = of.count(batches)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        output, loss_of = of.forward(GivenLosses(losses), batch, totals.double())
        weighed, count, _ = loss_of(output)
        total, tokens = total + weighed, tokens + int(count)
    means = [
        (losses[depth] * shifted(mask, depth)).sum() / shifted(mask, depth).sum()
        for depth in range(1 + depths)
    ]
    expected = means[0] + (SCALE * torch.stack(means[1:]).mean() if depths else 0)
    assert tokens == mask.sum()
    torch.testing.assert_close(total / tokens, expected)  # Megatron divides by all main tokens


def test_reported_sums_outlive_a_division_in_place(groups: Any) -> None:
    """Megatron divides the loss that it gets in place, after it was reported."""
    of = objective(groups, depths=0)
    losses = torch.rand(1, BATCH, LENGTH)
    (batch,) = [batch_of(some_rows(1) * 0)]
    output, loss_of = of.forward(GivenLosses(losses), batch, of.count([batch]))
    weighed, _, report = loss_of(output)
    weighed /= 7
    torch.testing.assert_close(report["sums"], losses[:, 0].sum(dim=1))


def test_a_step_without_a_valid_label_at_a_depth_has_no_loss_there(groups: Any) -> None:
    mask = torch.zeros(BATCH, LENGTH)
    mask[:, 0] = 1  # nothing is left after one shift
    of = objective(groups)
    (first, *_) = numbered(mask)
    totals = of.count(numbered(mask))
    output, loss_of = of.forward(GivenLosses(torch.rand(3, BATCH, LENGTH)), first, totals)
    weighed, _, report = loss_of(output)
    assert torch.isfinite(weighed)
    assert report["sums"][1:].tolist() == [0, 0]


def test_no_depth_counts_a_label_of_the_next_document(groups: Any) -> None:
    places = [(5, 1, 7), (2, 14)]  # three places of padding, none
    batch = packed_batch([documents(*row) for row in places], LENGTH)
    counts = objective(groups).count([batch])
    lengths = [length for row in places for length in row]
    expected = [sum(max(0, n - depth) for n in lengths) for depth in range(1 + DEPTHS)]
    assert counts.tolist() == expected
