"""Sums over tokens, then over rows, against closed forms in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_train.compression.scores import Ledger, Part, RowScores, moments, of_tokens
from hybrid_train.schema.importance import OverRows, OverTokens
from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = MEGATRON_WARNINGS
TOKENS, ROWS, ELEMENTS = 300, 3, 7
OF_A_ROW = {
    OverTokens.mean: lambda x: np.abs(x).mean(axis=0),
    OverTokens.l2: lambda x: np.sqrt((x**2).mean(axis=0)),
    OverTokens.variance: lambda x: x.var(axis=0),
}
OF_ROWS = {
    OverRows.mean: lambda x: np.mean(x, axis=0),
    OverRows.l2: lambda x: np.sqrt(np.mean(np.square(x), axis=0)),
}


def scored(
    values: torch.Tensor, counted: torch.Tensor, tokens: OverTokens, rows: OverRows
) -> torch.Tensor:
    """The scores of values [S, B, C], seen row by row in two microbatches."""
    with alone() as groups:
        spec = RowScores.spec((values.shape[-1],), rows)
        ledger = Ledger({"some": spec}, torch.device("cpu"))
        scores = RowScores(ledger, groups, tokens, rows)
        for part in (slice(0, 2), slice(2, None)):
            scores.see(Part("some"), values[:, part], counted[:, part])
            scores.close()
        return ledger.collect()["some"]


@pytest.mark.parametrize("rows", OverRows)
@pytest.mark.parametrize("tokens", OverTokens)
@pytest.mark.parametrize("scale", [1.0, 1e3], ids="scale={:g}".format)
def test_bfloat16_gives_what_float64_gives(
    tokens: OverTokens, rows: OverRows, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (TOKENS, ROWS, ELEMENTS)
    values = (scale * (1 + torch.randn(shape, generator=generator))).bfloat16()
    counted = torch.rand(TOKENS, ROWS, generator=generator) < 0.8
    found = scored(values, counted, tokens, rows).numpy()
    exact = values.double().numpy()
    of_rows = [OF_A_ROW[tokens](exact[counted[:, row].numpy(), row]) for row in range(ROWS)]
    np.testing.assert_allclose(found, OF_ROWS[rows](of_rows), rtol=1e-6)


def test_what_does_not_count_may_be_no_number_and_a_row_of_it_is_no_row() -> None:
    values, counted = torch.ones(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)
    values[:, 1], counted[:, 1] = torch.nan, False
    values[3, 0], counted[3, 0] = torch.inf, False
    found = scored(values, counted, OverTokens.mean, OverRows.mean)
    assert found.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_score_that_is_no_number_is_refused_by_its_name(wrong: float) -> None:
    values = torch.ones(4, 3, 2)
    values[2, 2, 1] = wrong
    with pytest.raises(UserError, match="scores of some are not finite") as caught:
        scored(values, torch.ones(4, 3, dtype=torch.bool), OverTokens.mean, OverRows.l2)
    assert caught.value.on_all_ranks


@pytest.mark.parametrize("over", OverTokens)
def test_an_element_that_no_token_saw_has_no_score(over: OverTokens) -> None:
    sums = moments(torch.zeros(0, 2, 3), over).sum(dim=1)
    assert of_tokens(sums, torch.zeros(2), over).eq(0).all()


def test_tensor_ranks_divide_the_first_axis_of_a_matrix() -> None:
    groups: Any = SimpleNamespace()
    ledger = Ledger({"heads": RowScores.spec((4, 3), OverRows.mean)}, torch.device("cpu"))
    scores = RowScores(ledger, groups, OverTokens.mean, OverRows.mean)
    assert scores._own_shape(Part("heads"), 6) == (2, 3)  # of two heads of three channels
