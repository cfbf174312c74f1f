"""A child out of a checkpoint, block by block, against the whole tensors cut at once."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.axes import Axis, sizes_of
from hybrid_train.anatomy.kinds import EMBEDDING, HEAD, Parameter
from hybrid_train.anatomy.layers import block_prefix, mtp_blocks, stored_tensors
from hybrid_train.anatomy.selection import (
    Indices,
    Kept,
    KeptLayer,
    Selection,
    chosen,
    of_expert,
    tensor_positions,
)
from hybrid_train.checkpoint import block_moves
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression import slicing
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import UserError
from tests.pruned import FINAL_NORM, MTP_BLOCK, SIZES, child_of, roomy, selection_of
from tests.random_checkpoints import random_tensors, write_checkpoint
from tests.tiny import tiny_job

ROWS = 64  # of the vocabulary


def whole(tensors: dict[str, Tensor], prefix: str, one: Parameter) -> Tensor:
    """A tensor with its parts one behind the other."""
    key, packed = prefix + one.stored, one.dims[0]
    if key in tensors:
        return tensors[key]
    return torch.cat([tensors[f"{key}.{part.name}"] for part in packed.parts])


def cut(values: Tensor, places: tuple[Indices | None, ...]) -> Tensor:
    kept = [
        np.arange(size) if one is None else one
        for size, one in zip(values.shape, places, strict=True)
    ]
    return values[np.ix_(*kept)]


def expected(parent: Model, tensors: dict[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """Every tensor of the child by its name, packed ones whole."""
    found, usual, shared = {}, sizes_of(parent, ROWS), selection.shared
    for one in (EMBEDDING, FINAL_NORM, HEAD):
        found[one.stored] = cut(tensors[one.stored], tensor_positions(one, usual, shared))
    for depth in range(1, mtp_blocks(parent) + 1):
        for one in MTP_BLOCK:
            key = block_prefix(depth) + one.stored
            found[key] = cut(tensors[key], tensor_positions(one, usual, shared))
    for layer in selection.layers:
        sizes, kept = layer.parent.sizes, selection.of(layer)
        for one in layer.parent.parameters:
            values = whole(tensors, layer.parent.prefix, one)
            key = layer.child.prefix + one.stored
            found[key] = (
                torch.stack(list(_experts(values, one, layer, kept)))
                if one.of_experts
                else cut(values, tensor_positions(one, sizes, kept))
            )
    return found


def _experts(values: Tensor, one: Parameter, layer: KeptLayer, kept: Kept) -> list[Tensor]:
    experts = chosen(kept, Axis.experts, layer.parent.sizes)
    return [
        cut(values[expert], tensor_positions(one, layer.parent.sizes, of_expert(kept, number)))
        for number, expert in enumerate(experts.tolist())
    ]


def read(folder: Path) -> dict[str, Tensor]:
    with StoredTensors(folder) as stored:
        return {name: stored.read(name, 0, stored.shape(name)[0]) for name in stored.names}


class Cut:
    """A random checkpoint of a model, and a child of it in a folder of its own."""

    def __init__(self, folder: Path, seed: int, *, pattern: str = "MEM*M-E*/*E/*E") -> None:
        self.parent = roomy(tiny_job(pattern).model)
        random, dropped = np.random.default_rng(seed), (2, 4)
        self.child = child_of(self.parent, SIZES, random, dropped)
        self.selection = selection_of(self.parent, self.child, random, dropped)
        self.tensors = random_tensors(self.parent, ROWS, seed)
        self.source = write_checkpoint(folder / "parent", self.tensors)
        self.output = folder / "child"
        self.output.mkdir()

    def write(self) -> list[slicing.Accounted]:
        with StoredTensors(self.source) as stored:
            slicing.require_parent(stored, self.parent, ROWS)
            made_of = slicing.slices(self.parent, self.child, self.selection, ROWS)
            accounts = slicing.account(stored, made_of)
            slicing.write(self.output, stored, made_of)
        slicing.require_accounted(self.output, accounts)
        return accounts


@pytest.mark.parametrize("block_bytes", [100, 1000, block_moves.BLOCK_BYTES])
def test_a_child_has_what_is_kept_of_each_tensor_whatever_the_blocks(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (block_moves, slicing):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(slicing, "_GAP_BYTES", block_bytes // 4)
    made = Cut(tmp_path, seed=block_bytes)
    made.write()
    found = read(made.output)
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        one.key: one.shape for one in stored_tensors(made.child, ROWS)
    }
    parameters = [one for layer in made.selection.layers for one in layer.parent.parameters]
    stored = {one.stored: one for one in (*parameters, *MTP_BLOCK, EMBEDDING, FINAL_NORM, HEAD)}
    for name, values in expected(made.parent, made.tensors, made.selection).items():
        one = next(one for key, one in stored.items() if name.endswith(key))
        prefix = name.removesuffix(one.stored)
        assert torch.equal(whole(found, prefix, one), values), name


def test_every_byte_of_the_parent_is_kept_or_cut(tmp_path: Path) -> None:
    made = Cut(tmp_path, seed=2)
    accounts = made.write()
    kept = sum(one.nbytes for one in read(made.output).values())
    assert sum(one.bytes for one in accounts) == sum(one.nbytes for one in made.tensors.values())
    assert sum(one.kept_bytes for one in accounts) == kept
    assert {one.name for one in accounts} == made.tensors.keys()
    gone = {one.name for one in accounts if not one.became}
    stay = {one.parent.prefix for one in made.selection.layers}
    lost = {layer.parent.prefix for layer in made.selection.layers} | {
        "mtp.",
        "embedding.",
        "output",
    }
    assert gone
    assert not any(name.startswith(tuple(stay | lost)) for name in gone)


def test_what_is_no_weight_stays_behind_and_is_said(tmp_path: Path) -> None:
    made = Cut(tmp_path, seed=3)
    with StoredTensors(made.source) as stored:
        made_of = slicing.slices(made.parent, made.child, made.selection, ROWS)
        before = slicing.account(stored, made_of)
    moment = {f"optimizer.exp_avg.{EMBEDDING.stored}": torch.ones(ROWS, 32)}
    made.source = write_checkpoint(tmp_path / "other", made.tensors | moment)
    after = [one for one in made.write() if one.is_weight]
    assert after == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_where_it_is_kept(
    value: float, tmp_path: Path
) -> None:
    made = Cut(tmp_path, seed=4)
    hidden = made.selection.hidden
    assert hidden is not None
    cut_away = next(one for one in range(32) if one not in hidden)
    made.tensors[EMBEDDING.stored][7, cut_away] = value
    made.source = write_checkpoint(tmp_path / "cut", made.tensors)
    made.write()
    made.tensors[EMBEDDING.stored][7, hidden[2]] = value
    made.source = write_checkpoint(tmp_path / "kept", made.tensors)
    with pytest.raises(UserError, match=rf"{EMBEDDING.stored}.*holds {value} in row 7"):
        made.write()


def test_a_tensor_that_nobody_knows_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    made = Cut(tmp_path, seed=5)
    odd = {"decoder.layers.0.mixer.extra": torch.ones(3)}
    made.source = write_checkpoint(tmp_path / "odd", made.tensors | odd)
    with pytest.raises(UserError, match=r"mixer\.extra has no place in the model"):
        made.write()
    del made.tensors[FINAL_NORM.stored]
    made.source = write_checkpoint(tmp_path / "lacking", made.tensors)
    with pytest.raises(UserError, match=rf"{FINAL_NORM.stored} is missing"):
        made.write()


def test_a_selection_of_another_child_is_refused(tmp_path: Path) -> None:
    made = Cut(tmp_path, seed=6)
    made.child.hidden_size -= 1
    with pytest.raises(AssertionError):
        made.write()
