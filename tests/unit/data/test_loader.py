"""Every rank reads its share of the same global batches, wherever and however it resumes."""

from collections.abc import Callable

import numpy as np
import pytest

from hybrid_train.data.batch import Batch, RowReader
from hybrid_train.data.loader import Loader, Validation
from hybrid_train.data.plan import Fields

LENGTH = 4


class Counted:
    """Row i holds the token i everywhere."""

    def fill(self, row: int) -> Fields:
        return {
            "tokens": np.full(LENGTH, row),
            "labels": np.full(LENGTH, row + 1),
            "loss_weights": np.ones(LENGTH, dtype=np.float32),
            "position_ids": np.arange(LENGTH),
        }


def numbers(batch: Batch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def loaders(
    *,
    microbatch: int,
    data_size: int,
    consumed: int = 0,
    batch_at: Callable[[int], int] = lambda _: 12,
) -> list[Loader]:
    return [
        Loader(
            RowReader(Counted()),
            microbatch=microbatch,
            global_batch=batch_at,
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


def test_a_global_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 10"):
        loaders(microbatch=5, data_size=2)


def grown(consumed: int) -> int:
    """Batches of 4, 4, 8, 8, 8, 12, 12, ... sequences."""
    return 4 if consumed < 8 else 8 if consumed < 32 else 12


@pytest.mark.parametrize(("microbatch", "data_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
def test_a_batch_that_grows_is_read_in_order_by_all_ranks(microbatch: int, data_size: int) -> None:
    ranks = loaders(microbatch=microbatch, data_size=data_size, batch_at=grown)
    read = [step(ranks) for _ in range(7)]
    assert [len(batch) for batch in read] == [4, 4, 8, 8, 8, 12, 12]
    assert [number for batch in read for number in batch] == list(range(56))


@pytest.mark.parametrize("steps_before", range(6))
def test_a_batch_that_grows_goes_on_at_the_same_sequence_and_size(steps_before: int) -> None:
    straight = loaders(microbatch=2, data_size=1, batch_at=grown)
    for _ in range(steps_before):
        step(straight)
    saved = straight[0].consumed_sequences
    resumed = loaders(microbatch=1, data_size=2, consumed=saved, batch_at=grown)
    assert resumed[0].global_batch == straight[0].global_batch
    assert [step(resumed) for _ in range(3)] == [step(straight) for _ in range(3)]


def test_a_batch_that_grows_to_an_uneven_size_is_refused_before_it_is_read() -> None:
    (loader, _) = loaders(microbatch=2, data_size=2, batch_at=lambda at: 4 if at < 8 else 6)
    for _ in range(2):
        next(loader)
    with pytest.raises(ValueError, match="6 sequences does not split"):
        next(loader)


def validations(count: int, *, microbatch: int, data_size: int) -> list[Validation]:
    return [
        Validation(
            RowReader(Counted()),
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
        for number, mask in zip(numbers(batch), batch.loss_weights, strict=True)
        if mask.any()
    ]
    assert sorted(counted) == list(range(7))
    assert {len(list(rank)) for rank in ranks} == {len(ranks[0])}  # none waits for another


class Padded(Counted):
    """Row i ends in a place of padding."""

    def fill(self, row: int) -> Fields:
        last = np.arange(LENGTH) == LENGTH - 1
        return {**super().fill(row), "padding": last, "sequence_index": last.astype(np.int32)}


def test_rows_that_fill_a_validation_up_are_padding() -> None:
    (batch,) = Validation(RowReader(Padded()), num_sequences=1, microbatch=2)
    assert batch.padding is not None
    assert batch.padding.tolist() == [[False] * (LENGTH - 1) + [True], [True] * LENGTH]


def test_validation_can_be_repeated() -> None:
    (validation,) = validations(7, microbatch=2, data_size=1)
    assert list(map(numbers, validation)) == list(map(numbers, validation))


def test_a_batch_moves_with_all_its_fields() -> None:
    batch = next(loaders(microbatch=2, data_size=1)[0]).to("meta")
    fields = (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
    assert {field.device.type for field in fields} == {"meta"}
    assert {tuple(field.shape) for field in fields} == {(2, LENGTH)}
