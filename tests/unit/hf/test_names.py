"""The table of names against published counts, the trainer's own names, and turned round."""

import math
from typing import Any

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
from hybrid_train.hf.tensors import turn_round
from tests.tiny import MEGATRON_WARNINGS, VOCAB, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS


# Tensors and elements of the released files (model cards; expert biases are tensors too).
@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("nemotron_h_4b", 311, 4_489_223_040),
        ("nemotron_h_47b", 577, 46_791_554_816),
        ("nemotron_nano_v2_9b", 341, 8_888_227_328),
        ("nemotron3_nano_4b", 263, 3_973_556_832),
        ("nemotron3_nano", 6_243, 31_577_940_288),
        ("nemotron3_super", 42_683, 123_611_033_088),
    ],
)
def test_the_table_names_as_many_tensors_as_the_released_files_hold(
    model: str, tensors: int, elements: int
) -> None:
    job = compose("count", [f"model={model}", "model.vocab_size=131072"])
    theirs = turn_round(NEMOTRON_H.table(job.model, 131072))
    assert len(theirs) == tensors
    assert sum(math.prod(one.shape) for one in theirs.values()) == elements


def test_the_rows_of_every_tensor_of_theirs_are_named_once() -> None:
    for one in turn_round(NEMOTRON_H.table(tiny_job("ME*-/*E/*E").model, VOCAB)).values():
        at = 0
        for start, piece in sorted(one.pieces.items()):
            assert start == at, one.name
            alone = piece.stop - piece.start == 1 and "experts." in piece.key
            at += one.shape[0] if alone else piece.stop - piece.start
        assert at == one.shape[0], one.name


@pytest.mark.parametrize("repeated", [True, False], ids=["one MTP block", "two MTP blocks"])
def test_the_table_has_the_names_and_shapes_that_a_run_saves(groups: Any, repeated: bool) -> None:
    from hybrid_train.checkpoint.shards import shards_of

    job = tiny_job("MEM*-/*E/*E")
    job.model.mtp.repeated_block = repeated
    saved = {
        shard.weight.key: tuple(shard.weight.global_shape)
        for shard in shards_of([tiny_model(job, groups)], groups)
    }
    assert {stored.key: stored.shape for stored in NEMOTRON_H.table(job.model, VOCAB)} == saved
