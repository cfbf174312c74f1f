"""Rankings on disk: what is written is read, what is not whole or no number is refused."""

from pathlib import Path

import numpy as np
import pytest

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import layers
from hybrid_train.compression import ranking
from hybrid_train.compression.ranking import Header, Ranking, name_of, order
from hybrid_train.schema.problems import UserError
from tests.tiny import tiny_job

HEADER = Header("runs/parent", 5, "abc", 8, 16, "mean", "l2", {"tokenizer": "t"}, 7)


def some_scores() -> Ranking:
    layer = layers(tiny_job().model)[0]
    scores = {
        ranking.HIDDEN: np.arange(32, dtype=np.float32),
        name_of(layer, Axis.ssm_heads): np.ones((4, 16), np.float32),
        ranking.LAYERS + "cosine": np.ones(6, np.float32),
        ranking.BLOCKS + "loss": np.ones((6, 6), np.float32),
    }
    return Ranking(HEADER, scores)


def test_a_ranking_that_was_written_is_read(tmp_path: Path) -> None:
    written = some_scores()
    ranking.write(written, tmp_path)
    found = ranking.read(tmp_path)
    assert found.header == HEADER
    layer = layers(tiny_job().model)[0]
    for one in (written, found):
        np.testing.assert_array_equal(one.hidden, np.arange(32))
        assert one.of(layer, Axis.ssm_heads).shape == (4, 16)
        assert one.layers("cosine").shape == (6,)
        assert one.blocks("loss").shape == (6, 6)


def test_scores_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"no scores of layers\.loss; it has .*layers\.cosine"):
        some_scores().layers("loss")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_not_written(wrong: float, tmp_path: Path) -> None:
    bad = some_scores()
    bad.scores[ranking.HIDDEN][3] = wrong
    with pytest.raises(UserError, match="scores of hidden are not finite"):
        ranking.write(bad, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_half_a_ranking_is_none(tmp_path: Path) -> None:
    ranking.write(some_scores(), tmp_path)
    scores = tmp_path / ranking.SCORES
    scores.write_bytes(scores.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        ranking.read(tmp_path)
    (tmp_path / ranking.FILE_NAME).unlink()
    with pytest.raises(UserError, match="is no ranking"):
        ranking.read(tmp_path)


def test_of_equal_scores_the_first_element_comes_first() -> None:
    assert order([1.0, 3.0, 1.0, 3.0, 1.0]).tolist() == [1, 3, 0, 2, 4]
    many = np.zeros(1000, np.float32)
    assert order(many).tolist() == list(range(1000))
