"""Rows are dealt out once each; what fills up counts nowhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.scored import packed_rows, whole_rows
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS


def passes(rows: list[Any], rank: int, ranks: int, *, microbatch: int, stages: int = 1) -> Any:
    from hybrid_train.compression.passes import Passes

    def group(rank: int, size: int) -> Any:
        return SimpleNamespace(rank=lambda: rank, size=lambda: size)

    network: Any = SimpleNamespace(
        groups=SimpleNamespace(dp=group(rank, ranks), pp=group(0, stages)),
        passes_multiple=stages,
        own=lambda batch: batch,
    )
    return Passes(network, rows.__getitem__, microbatch)


@pytest.mark.parametrize("kind", [whole_rows, packed_rows])
@pytest.mark.parametrize(
    ("ranks", "microbatch", "stages"), [(1, 1, 1), (1, 4, 1), (2, 1, 1), (3, 2, 1), (2, 2, 2)]
)
def test_each_row_counts_once_and_all_ranks_take_the_same_passes(
    kind: Any, ranks: int, microbatch: int, stages: int
) -> None:
    from hybrid_train.compression.passes import counted_tokens

    rows, counted, shapes = kind(7), [], []
    for rank in range(ranks):
        made = passes(rows, rank, ranks, microbatch=microbatch, stages=stages)
        groups = list(made.groups(len(rows)))
        shapes.append([[batch.tokens.shape for batch in one] for one in groups])
        assert all(len(one) % stages == 0 for one in groups)
        for batch in (batch for one in groups for batch in one):
            counts = counted_tokens(batch).t()
            assert not (counts & (batch.padding if batch.padding is not None else False)).any()
            counted += [
                tokens for tokens, own in zip(batch.tokens, counts, strict=True) if own.any()
            ]
    assert all(shape == shapes[0] for shape in shapes)
    found = sorted(tokens.tolist() for tokens in counted)
    assert found == sorted(row.tokens.tolist() for row in rows)


def test_a_row_that_fills_up_has_no_label_and_no_token_that_counts() -> None:
    from hybrid_train.compression.passes import counted_tokens

    ((batch,),) = passes(whole_rows(3), 0, 1, microbatch=4).groups(3)
    assert counted_tokens(batch).sum(0).tolist() == [16, 16, 16, 0]
    assert torch.equal(batch.loss_weights.sum(1), torch.tensor([16.0, 16.0, 16.0, 0.0]))
