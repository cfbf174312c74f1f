"""Stored targets of rows: found by position or content, refused where they are of another row."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_train.data.batch import Batch, Row, RowIdentity, stack
from hybrid_train.distillation import targets
from hybrid_train.distillation.target_folder import DIGESTS, HEAD, SUMS, Header, Part
from hybrid_train.distillation.targets import StoredTeacher, Targets, digest_of, sum_of
from hybrid_train.ops.context import own_chunks
from hybrid_train.ops.logits import HeadPart
from hybrid_train.ops.reference import Reference, TopTokens
from hybrid_train.schema.data import Split
from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = MEGATRON_WARNINGS

WIDTH, VOCAB, TOP = 6, 256_000, 3
# A phase of 5 rows of 4 tokens, then one of 3 rows of 8; and a validation of 4 rows.
PARTS = [
    Part("train-0", "train", 4, 0, 5, 2),
    Part("train-1", "train", 8, 20, 3, 2),
    Part("validation-0", "validation", 4, 0, 4, 3),
]


def row(part: Part, number: int) -> Row:
    generator = np.random.default_rng([part.length, number, len(part.split)])
    tokens = generator.integers(VOCAB, size=part.length)
    identity = RowIdentity(number, part.start + number * part.length, Split(part.split))
    weights, places = np.ones(part.length, np.float32), np.arange(part.length)
    return Row(tokens, tokens, weights, places, identity=identity)


def hidden_of(one: Row) -> Tensor:
    """What the teacher makes of a row: something that only this row has."""
    scale = torch.arange(1, WIDTH + 1)
    return (torch.from_numpy(one.tokens)[:, None] / VOCAB * scale).to(torch.bfloat16)


def top_of(one: Row) -> dict[str, Tensor]:
    tokens = torch.from_numpy(one.tokens)[:, None]
    found = torch.cat([tokens, VOCAB - 1 - tokens, tokens * 0 + VOCAB - 1], dim=-1).int()
    return {"tokens": found, "logits": found / 7, "log_sum": found[:, 0].float() + 1}


def written(folder: Path, what: str) -> Targets:
    header = Header(
        what=what, top_k=None if what == "hidden" else TOP, dtype="bfloat16", vocab_size=VOCAB,
        mtp_depths=0, tokenizer="t", data={}, seed=1, teacher={}, parts=PARTS,
    )  # fmt: skip
    for part in PARTS:
        (folder / part.name).mkdir()
        for file in range(part.files):
            rows = [row(part, number) for number in part.rows_of(file)]
            said = [{"hidden": hidden_of(one)} if what == "hidden" else top_of(one) for one in rows]
            values = {name: torch.stack([one[name] for one in said]) for name in said[0]}
            sums = torch.tensor([sum_of(one.values()) for one in said])
            digests = torch.tensor([digest_of(one) for one in rows])
            save_file({DIGESTS: digests, SUMS: sums, **values}, part.path(folder, file))
    head = torch.arange(10 * WIDTH, dtype=torch.bfloat16).view(10, WIDTH)
    save_file({HEAD: head}, folder / HEAD)
    return Targets(folder, header)


@pytest.fixture
def hidden(tmp_path: Path) -> Targets:
    return written(tmp_path, "hidden")


def batch_of(targets: Targets, part: Part, *numbers: int) -> Batch:
    return stack([targets(row(part, number)) for number in numbers])


def read(targets: Targets, one: Row) -> dict[str, Tensor]:
    """What the last pipeline stage reads of a row."""
    return targets.read(targets(one).row_extras["target_row"].tolist(), len(one.tokens))


class Rank(SimpleNamespace):
    """Groups as one process of a layout sees them: (its rank, size) of each."""

    def __init__(self, pp: tuple[int, int] = (0, 1), cp: tuple[int, int] = (0, 1)) -> None:
        super().__init__(
            **{
                name: SimpleNamespace(rank=lambda at=at: at[0], size=lambda at=at: at[1])
                for name, at in (("pp", pp), ("cp", cp))
            }
        )


@pytest.fixture
def one_process() -> Iterator[None]:
    with alone():
        yield


def ahead(targets: Targets, batch: Batch, groups: Any = None) -> tuple[StoredTeacher, Batch]:
    teacher = StoredTeacher(targets, groups or Rank())
    (found,) = teacher.run_ahead([batch], with_mtp=False)
    return teacher, found


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_row_gets_its_own_target_in_whatever_order_rows_are_read(
    part: Part, hidden: Targets
) -> None:
    for number in np.random.default_rng(0).permutation(part.rows).tolist():
        assert read(hidden, row(part, number))["hidden"].equal(hidden_of(row(part, number)))


def test_a_row_of_a_validation_is_found_by_what_is_in_it(hidden: Targets) -> None:
    one = row(PARTS[2], 3)
    elsewhere = replace(one, identity=replace(one.identity, number=0, position=0))
    assert read(hidden, elsewhere)["hidden"].equal(hidden_of(one))


def test_a_row_with_another_token_is_refused(hidden: Targets) -> None:
    one = row(PARTS[1], 2)
    changed = one.tokens.copy()
    changed[-1] ^= 1
    with pytest.raises(UserError, match="train row 2 is not the row that the teacher"):
        read(hidden, replace(one, tokens=changed))


def test_a_row_whose_documents_are_cut_otherwise_is_refused(hidden: Targets) -> None:
    index = np.array([0, 0, 1, 1], np.int32)
    with pytest.raises(UserError, match="is not the row"):
        read(hidden, replace(row(PARTS[0], 1), sequence_index=index))


@pytest.mark.parametrize(
    ("position", "length"), [(44, 8), (2, 4), (0, 8), (20, 4)],
    ids=["behind the last", "between two", "longer", "shorter"],
)  # fmt: skip
def test_a_row_that_begins_where_none_was_written_is_refused(
    position: int, length: int, hidden: Targets
) -> None:
    one = row(replace(PARTS[0], length=length), 0)
    identity = RowIdentity(7, position)
    with pytest.raises(UserError, match="train row 7 has no target"):
        read(hidden, replace(one, identity=identity))


def test_a_row_of_a_validation_that_was_not_read_is_refused(hidden: Targets) -> None:
    with pytest.raises(UserError, match="validation row 9 has no target"):
        read(hidden, row(PARTS[2], 9))


def test_a_turned_bit_is_noticed_in_its_row_alone(hidden: Targets) -> None:
    path = PARTS[0].path(hidden.folder, 1)
    content = load_file(path)
    content["hidden"].view(torch.int16)[1, 0, 0] ^= 1
    save_file(content, path)
    read(hidden, row(PARTS[0], 2))
    with pytest.raises(UserError, match="is damaged: train row 3"):
        read(hidden, row(PARTS[0], 3))


@pytest.mark.usefixtures("one_process")
def test_only_the_last_stage_reads_and_a_context_rank_has_the_targets_of_its_tokens(
    hidden: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(hidden, PARTS[1], 2, 0)
    _, whole = ahead(hidden, batch)
    for rank in (0, 1):
        _, found = ahead(hidden, batch.part_of(rank, 2), Rank(pp=(3, 4), cp=(rank, 2)))
        part = own_chunks(whole.token_extras["target_hidden"], rank, 2, dim=1)
        assert found.token_extras["target_hidden"].equal(part)
    monkeypatch.setattr(targets, "_opened", lambda _: pytest.fail("a file was opened"))
    _, found = ahead(hidden, batch, Rank(pp=(2, 4)))
    assert not found.token_extras


@pytest.mark.usefixtures("one_process")
def test_what_is_wrong_with_a_row_is_said_on_all_processes(hidden: Targets) -> None:
    with pytest.raises(UserError, match="validation row 9 has no target") as error:
        ahead(hidden, batch_of(hidden, PARTS[2], 9))
    assert error.value.on_all_ranks


@pytest.mark.usefixtures("one_process")
def test_targets_of_a_microbatch_are_in_the_order_of_hidden_states(hidden: Targets) -> None:
    teacher, batch = ahead(hidden, batch_of(hidden, PARTS[0], 3, 0))
    student = HeadPart(torch.zeros(12, 1), VOCAB)
    found = teacher.reference(batch, student)
    assert isinstance(found, Reference)
    both = torch.stack([hidden_of(row(PARTS[0], number)) for number in (3, 0)])
    assert found.hidden.equal(both.transpose(0, 1).reshape(-1, WIDTH))
    # The rows of the student's padding have no weight.
    assert found.head.weight[:10].equal(load_file(hidden.folder / HEAD)[HEAD])
    assert found.head.weight.shape == (12, WIDTH)
    assert not found.head.weight[10:].any()


@pytest.mark.usefixtures("one_process")
def test_the_last_token_of_a_large_vocabulary_is_kept(tmp_path: Path) -> None:
    stored = written(tmp_path, "top_k")
    student: Any = None  # nobody looks at it
    teacher, batch = ahead(stored, batch_of(stored, PARTS[0], 1))
    found = teacher.reference(batch, student)
    assert isinstance(found, TopTokens)
    said = top_of(row(PARTS[0], 1))
    assert found.tokens.equal(said["tokens"])
    assert int(found.tokens.max()) == VOCAB - 1
    assert found.logits.equal(said["logits"])
    assert found.log_sum.equal(said["log_sum"])


def test_depths_that_were_not_stored_are_missed_on_all_processes(hidden: Targets) -> None:
    with pytest.raises(UserError, match="has none of the MTP depths") as error:
        StoredTeacher(hidden, Rank()).run_ahead([], with_mtp=True)
    assert error.value.on_all_ranks
