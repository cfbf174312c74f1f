"""What the log says of the layout that a checkpoint was saved under."""

from pathlib import Path

import pytest

from hybrid_train.checkpoint.store import (
    layout_in_words,
    read_layout,
    write_layout,
)

ALONE = {
    "processes": 1,
    "tensor": 1,
    "pipeline": 1,
    "virtual_pipeline": 1,
    "context": 1,
    "expert": 1,
    "expert_tensor": 1,
    "data": 1,
    "distributed_optimizer": 1,
}


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({}, "1 process"),
        ({"processes": 4, "data": 4}, "data=4"),
        ({"processes": 4, "tensor": 2, "expert_tensor": 2, "data": 2}, "tensor=2 data=2"),
        ({"processes": 2, "tensor": 2, "expert": 2}, "tensor=2 expert=2 expert_tensor=1"),
        ({"processes": 2, "expert_tensor": 2, "data": 2}, "expert_tensor=2 data=2"),
        (
            {"processes": 2, "pipeline": 2, "virtual_pipeline": 3},
            "pipeline=2 virtual_pipeline=3",
        ),
        (
            {"processes": 2, "data": 2, "distributed_optimizer": 0},
            "data=2 distributed_optimizer=0",
        ),
    ],
)
def test_words_name_what_is_split_and_nothing_else(split: dict[str, int], words: str) -> None:
    assert layout_in_words(ALONE | split) == words


def test_a_layout_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_layout(tmp_path, ALONE)
    assert read_layout(tmp_path) == ALONE


def test_a_checkpoint_without_a_layout_has_an_empty_one(tmp_path: Path) -> None:
    assert read_layout(tmp_path) == {}
