"""Batch: what each process sees of a microbatch."""

from dataclasses import replace

import pytest
import torch

from hybrid_train.data.batch import Batch
from tests.packed import documents, packed_batch
from tests.tiny import batch_of, some_rows


def test_context_ranks_share_the_tokens_and_each_knows_all_documents() -> None:
    batch = packed_batch([documents(3, 4), documents(6)], 8)
    for rank in range(2):
        part = batch.part_of(rank, 2)
        for name in ("tokens", "labels", "loss_weights", "position_ids", "padding"):
            assert getattr(part, name).shape == (2, 4)
        assert part.sequence_index is batch.sequence_index


def test_padding_is_what_no_document_of_a_packed_row_fills() -> None:
    batch = packed_batch([documents(3, 4), documents(6)], 8)
    assert batch.padding is not None
    assert batch.padding.nonzero().tolist() == [[0, 7], [1, 6], [1, 7]]


def test_a_label_without_weight_is_no_padding() -> None:
    batch = packed_batch([documents(3, 4), documents(6)], 8)
    unweighted = replace(batch, loss_weights=torch.zeros(2, 8))
    assert unweighted.padding is batch.padding


def test_a_batch_without_labels_is_all_padding_if_it_can_have_any() -> None:
    packed = packed_batch([documents(3, 4), documents(6)], 8).without_labels()
    assert packed.padding is not None
    assert packed.padding.all()
    assert not packed.loss_weights.any()
    assert batch_of(some_rows(2)).without_labels().padding is None


def test_padding_that_no_index_tells_from_documents_is_refused() -> None:
    with pytest.raises(ValueError, match="padding needs a sequence_index"):
        replace(packed_batch([documents(3, 4)], 8), sequence_index=None)


def test_rows_that_are_not_packed_have_no_padding_and_no_index() -> None:
    batch = batch_of(some_rows(2), torch.zeros(2, 16)).part_of(0, 2).to("cpu")
    assert batch.padding is None
    assert batch.sequence_index is None


def extended() -> Batch:
    """A batch with extra fields of both kinds."""
    batch = packed_batch([documents(3, 4), documents(6)], 8)
    return replace(
        batch,
        token_extras={"teacher": torch.arange(2 * 8 * 3).view(2, 8, 3)},
        row_extras={"advantage": torch.tensor([0.5, -1.0]), "other": torch.arange(14).view(2, 7)},
    )


def test_extra_fields_of_tokens_are_cut_as_tokens_are_and_those_of_rows_stay_whole() -> None:
    batch = extended()
    for rank, places in enumerate(([0, 1, 6, 7], [2, 3, 4, 5])):
        part = batch.part_of(rank, 2)
        assert torch.equal(part.tokens, batch.tokens[:, places])
        assert torch.equal(part.token_extras["teacher"], batch.token_extras["teacher"][:, places])
        assert part.row_extras.keys() == batch.row_extras.keys()
        for name, values in batch.row_extras.items():
            assert part.row_extras[name] is values


def test_extra_fields_move_with_the_batch() -> None:
    moved = extended().to("meta")
    fields = (*moved.token_extras.values(), *moved.row_extras.values(), moved.padding)
    assert [one.device.type for one in fields if one is not None] == ["meta"] * 4


def test_a_batch_is_made_again_of_its_fields() -> None:
    batch = replace(packed_batch([documents(5, 4)], 16), row_extras={"id": torch.arange(1)})
    again = Batch(**batch.by_name())
    assert again == batch
    assert again.by_name().keys() == batch.by_name().keys()
