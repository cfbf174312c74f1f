"""Differences between a checkpoint and a Hugging Face folder: names, shapes, formats, values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_train.hf.read import Folder
from hybrid_train.hf.tensors import Theirs, require_finite, theirs_from_ours
from hybrid_train.hf.write import Checkpoint, Weights
from hybrid_train.schema.units import counted


@dataclass
class Differences:
    """Every tensor that is not the same on both sides, in words; empty lists if all are."""

    tensors: int = 0  # compared
    only_ours: list[str] = field(default_factory=list)
    only_theirs: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)  # of equal values, or they stand below too
    values: list[str] = field(default_factory=list)

    @property
    def is_same_model(self) -> bool:
        """Whether all is equal but for number formats, up to the narrower of the two."""
        return not (self.only_ours or self.only_theirs or self.shapes or self.values)

    def lines(self) -> list[str]:
        """Say what differs, each kind with its number."""
        kinds = {
            "only in the checkpoint": self.only_ours,
            "only in the folder": self.only_theirs,
            "of another shape": self.shapes,
            "of another number format": self.formats,
            "of other values": self.values,
        }
        return [
            f"{counted(len(found), 'tensor')} {kind}: {_some(found)}"
            for kind, found in kinds.items()
            if found
        ]


def _some(found: list[str], most: int = 5) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def differences(checkpoint: Checkpoint, weights: Weights, folder: Folder) -> Differences:
    """Compare every tensor of both sides, a part at a time."""
    theirs = checkpoint.theirs()
    found = Differences()
    present, stored = folder.names, weights.names
    found.only_theirs = sorted(present - theirs.keys())
    for name, one in theirs.items():
        lacking = [piece.key for piece in one.pieces.values() if piece.key not in stored]
        if name not in present:
            found.only_ours.append(name)
        elif lacking:
            found.only_theirs.append(f"{name} ({lacking[0]})")
        elif folder.shape(name) != one.shape:
            found.shapes.append(f"{name}: {one.shape} here, {folder.shape(name)} there")
        else:
            found.tensors += 1
            _compare(one, weights, folder, found)
    keys = {piece.key for one in theirs.values() for piece in one.pieces.values()}
    found.only_ours += sorted(stored - keys)
    return found


def _compare(one: Theirs, weights: Weights, folder: Folder, found: Differences) -> None:
    here = weights.dtype(next(iter(one.pieces.values())).key)
    there = folder.dtype(one.name)
    if here != there:
        found.formats.append(f"{one.name}: {_word(here)} here, {_word(there)} there")
    narrow = min((here, there), key=lambda dtype: dtype.itemsize)
    row, largest, first = 0, 0.0, None
    for part in theirs_from_ours(one, weights):
        ours = weights.read(part.name, part.start, part.stop)
        require_finite(weights, part.name, ours, part.start)
        ours = ours.view(part.shape)
        block = folder.read(one.name, row, row + len(ours))
        if not _equal(ours, block, narrow):
            change = (ours.double() - block.double()).abs()
            largest = max(largest, change.max().nan_to_num(torch.inf).item())
            if first is None:
                unequal = (ours.to(narrow) != block.to(narrow)).nonzero()[0].tolist()
                first = [row + unequal[0], *unequal[1:]]
        row += len(ours)
    if first is not None:
        found.values.append(f"{one.name}: by at most {largest:.3g}, first at {first}")


def _equal(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(ours.to(dtype), theirs.to(dtype))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
