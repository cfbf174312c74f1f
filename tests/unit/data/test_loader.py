"""Every rank reads its share of the same global batches, wherever and however it resumes."""

import pytest
import torch
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.data.loader import Loader, Validation

LENGTH = 4


class Counted:
    """Sequence i holds the token i everywhere."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return {
            "tokens": torch.full((LENGTH,), index),
            "labels": torch.full((LENGTH,), index + 1),
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


def numbers(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def loaders(
    *, microbatch: int, data_size: int, consumed: int = 0, sequences: int = 100
) -> list[Loader]:
    return [
        Loader(
            Counted(sequences),
            microbatch=microbatch,
            global_batch=12,
            data_rank=rank,
            data_size=data_size,
            consumed_sequences=consumed,
        )
        for rank in range(data_size)
    ]


def step(ranks: list[Loader]) -> list[int]:
    """Read one step on every rank; the sequences microbatch by microbatch, rank by rank."""
    read = range(ranks[0].microbatches_per_step)
    return [number for _ in read for rank in ranks for number in numbers(next(rank))]


@pytest.mark.parametrize("data_size", [1, 2, 3], ids="ranks={}".format)
@pytest.mark.parametrize("microbatch", [1, 2], ids="microbatch={}".format)
def test_microbatches_of_all_ranks_are_the_global_batch(microbatch: int, data_size: int) -> None:
    ranks = loaders(microbatch=microbatch, data_size=data_size)
    assert step(ranks) == list(range(12))
    assert step(ranks) == list(range(12, 24))


@pytest.mark.parametrize(("microbatch", "data_size"), [(3, 1), (1, 2), (3, 2), (2, 3)])
def test_a_run_resumes_on_other_ranks_and_microbatches(microbatch: int, data_size: int) -> None:
    before = loaders(microbatch=4, data_size=1)
    step(before)
    saved = before[0].consumed_sequences
    assert saved == 12
    after = loaders(microbatch=microbatch, data_size=data_size, consumed=saved)
    assert step(after) == step(before) == list(range(12, 24))


def test_the_position_moves_with_whole_steps_only() -> None:
    (loader,) = loaders(microbatch=6, data_size=1)
    next(loader)
    assert loader.consumed_sequences == 0  # a resumed run repeats the step from its start
    next(loader)
    assert loader.consumed_sequences == 12


def test_a_loader_ends_after_the_last_whole_step() -> None:
    (loader,) = loaders(microbatch=12, data_size=1, sequences=30)
    assert [numbers(batch) for batch in loader] == [list(range(12)), list(range(12, 24))]


def test_a_global_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 10"):
        loaders(microbatch=5, data_size=2)


def test_a_position_inside_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of the global batch of 12"):
        loaders(microbatch=1, data_size=1, consumed=7)


def validations(count: int, *, microbatch: int, data_size: int) -> list[Validation]:
    return [
        Validation(
            Counted(10),
            num_sequences=count,
            microbatch=microbatch,
            data_rank=rank,
            data_size=data_size,
        )
        for rank in range(data_size)
    ]


@pytest.mark.parametrize(("microbatch", "data_size"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3)])
def test_validation_counts_the_same_sequences_on_every_plan(
    microbatch: int, data_size: int
) -> None:
    ranks = validations(7, microbatch=microbatch, data_size=data_size)
    counted = [
        number
        for rank in ranks
        for batch in rank
        for number, mask in zip(numbers(batch), batch.loss_mask, strict=True)
        if mask.any()
    ]
    assert sorted(counted) == list(range(7))
    assert {len(list(rank)) for rank in ranks} == {len(ranks[0])}  # none waits for another


def test_validation_can_be_repeated() -> None:
    (validation,) = validations(7, microbatch=2, data_size=1)
    assert list(map(numbers, validation)) == list(map(numbers, validation))


def test_validation_repeats_no_sequence_when_there_are_few() -> None:
    (validation,) = validations(1000, microbatch=5, data_size=1)
    assert validation.num_sequences == 10
    assert [number for batch in validation for number in numbers(batch)] == list(range(10))


def test_a_batch_moves_with_all_its_fields() -> None:
    batch = next(loaders(microbatch=2, data_size=1)[0]).to("meta")
    fields = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
    assert {field.device.type for field in fields} == {"meta"}
    assert {tuple(field.shape) for field in fields} == {(2, LENGTH)}
