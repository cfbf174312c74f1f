"""Row transforms stand between reading and stacking, and depend on the row alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_train.data.batch import Batch, Row, RowReader, RowTransform, stack
from hybrid_train.data.loader import Loader, Validation
from hybrid_train.data.plan import Fields
from hybrid_train.schema.data import Split
from hybrid_train.schema.problems import UserError

LENGTH, SEPARATOR, START = 8, 7, 4096


class Numbered:
    """Row i holds i, but for a separator at the place i modulo the length."""

    def fill(self, row: int) -> Fields:
        tokens = np.full(LENGTH, 100 + row)
        tokens[row % LENGTH] = SEPARATOR
        return {
            "tokens": tokens,
            "labels": np.append(tokens[1:], 100 + row),
            "loss_weights": np.ones(LENGTH, dtype=np.float32),
            "position_ids": np.arange(LENGTH),
        }


def only_the_answer(row: Row) -> Row:
    """Count no label up to the separator."""
    seen = np.cumsum(row.tokens == SEPARATOR) > 0
    return replace(row, loss_weights=np.where(seen, row.loss_weights, np.float32(0)))


def with_extras(row: Row) -> Row:
    """Add random numbers of each token, and the place of the row in the run."""
    noise = row.generator("noise").random((LENGTH, 2))
    place = np.asarray(row.identity.position)
    return replace(row, token_extras={"noise": noise}, row_extras={"place": place})


def reader(*transforms: RowTransform, seed: int = 1, split: Split = Split.train) -> RowReader:
    return RowReader(Numbered(), transforms, split, seed, START)


def loader(rank: int = 0, size: int = 1, consumed: int = 0, microbatch: int = 2) -> Loader:
    return Loader(
        reader(only_the_answer, with_extras),
        microbatch=microbatch,
        global_batch=lambda _: 12,
        data_rank=rank,
        data_size=size,
        consumed_sequences=consumed,
    )


def rows(batches: Sequence[Batch]) -> list[list[Any]]:
    """The rows of batches, each as plain values of all its fields, in order of their numbers."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            extras = (*batch.token_extras.values(), *batch.row_extras.values())
            values = (batch.tokens.amax(dim=1), batch.loss_weights, *extras)
            found.append([one[row].tolist() for one in values])
    return sorted(found)


def test_labels_before_the_separator_do_not_count() -> None:
    batch = stack([reader(only_the_answer)(number) for number in (0, 3)])
    assert batch.loss_weights.tolist() == [[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.padding is None
    untouched = stack([reader()(number) for number in (0, 3)])
    assert torch.equal(batch.tokens, untouched.tokens)
    assert untouched.loss_weights.all()


def test_transforms_act_in_their_order() -> None:
    def twice(row: Row) -> Row:
        return replace(row, loss_weights=2 * row.loss_weights)

    def one_less(row: Row) -> Row:
        return replace(row, loss_weights=row.loss_weights - np.float32(1))

    assert reader(twice, one_less)(0).loss_weights[0] == 1
    assert reader(one_less, twice)(0).loss_weights[0] == 0


def test_a_resumed_loader_reads_the_same_transformed_rows() -> None:
    straight = loader()
    for _ in range(6):
        next(straight)
    resumed = loader(consumed=straight.consumed_sequences)
    assert rows([next(resumed) for _ in range(6)]) == rows([next(straight) for _ in range(6)])


@pytest.mark.parametrize(("size", "microbatch"), [(2, 2), (3, 1), (3, 4)])
def test_several_ranks_read_the_transformed_rows_of_one(size: int, microbatch: int) -> None:
    alone, ranks = loader(), [loader(rank, size, microbatch=microbatch) for rank in range(size)]
    each = 12 // (size * microbatch)
    all_or_none = [next(rank) for _ in range(each) for rank in ranks]
    expected = rows([next(alone) for _ in range(6)])
    assert rows(all_or_none) == expected
    assert len({str(row[2]) for row in expected}) == 12  # no two have the same random numbers
    assert [row[-1] for row in expected] == [START + LENGTH * number for number in range(12)]


def test_random_numbers_depend_on_seed_split_row_and_purpose() -> None:
    def drawn(number: int = 3, purpose: str = "mask", **settings: Any) -> float:
        return float(reader(with_extras, **settings)(number).generator(purpose).random())

    others = [drawn(4), drawn(purpose="drop"), drawn(seed=2), drawn(split=Split.validation)]
    assert len({drawn(), *others}) == 5
    assert drawn() == drawn()


def test_rows_that_fill_a_validation_up_have_the_extra_fields_too() -> None:
    (batch,) = Validation(reader(with_extras), num_sequences=1, microbatch=2)
    assert batch.token_extras["noise"].shape == (2, LENGTH, 2)
    assert batch.loss_weights.sum(dim=1).tolist() == [LENGTH, 0]


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_which_some_have_padding_are_no_batch(first: int) -> None:
    row = reader()(0)
    pair = [row, replace(row, padding=np.zeros(LENGTH, dtype=bool))]
    with pytest.raises(UserError, match="padding is in some rows of a microbatch"):
        stack([pair[first], pair[1 - first]])


def shorter(row: Row) -> Row:
    return replace(row, labels=row.labels[1:])


def as_floats(row: Row) -> Row:
    return replace(row, tokens=row.tokens.astype(np.float32))


def nothing(row: Row) -> Any:
    del row


def of_other_length(row: Row) -> Row:
    return replace(row, token_extras={"teacher": np.ones(LENGTH + 1)})


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (shorter, r"shorter returned labels as int64 \[7\], and it got int64 \[8\]"),
        (as_floats, r"as_floats returned tokens as float32 \[8\]"),
        (nothing, "nothing returned NoneType; it must return a Row"),
        (of_other_length, "teacher of shape .9,., but the row has 8 tokens"),
    ],
)
def test_what_is_no_row_of_the_batch_is_refused_by_name(
    transform: RowTransform, words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        reader(transform)(0)
    assert error.value.of_content


def test_rows_of_a_microbatch_have_the_same_extra_fields() -> None:
    plain, extended = reader()(0), reader(with_extras)(1)
    with pytest.raises(UserError, match="extra field noise is in some rows"):
        stack([plain, extended])
    longer = replace(extended, row_extras={"place": np.ones(3)})
    with pytest.raises(UserError, match="place has several shapes"):
        stack([extended, longer])
