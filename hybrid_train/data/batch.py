"""Batch: what travels from the loader to the model, and the rows that it is made of.

Dimensions: B sequences of a microbatch, L sequence length in tokens.

Row transforms stand between reading rows and stacking them. Each takes a row and returns one; what
it returns depends on the row alone, so every rank that reads a row and every resumed run sees the
same. Where it needs random numbers, the row has a generator of its own.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_train.data.plan import Fields
from hybrid_train.ops.context import own_chunks
from hybrid_train.schema.data import Split
from hybrid_train.schema.problems import UserError

_WHOLE = ("sequence_index", "source", "row_extras")  # on every context-parallel rank
Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Attributes:
        tokens: inputs, [B, L], int64.
        labels: the token that follows each input, [B, L], int64.
        loss_weights: what each label counts in the loss, 0 where it does not, [B, L], float32.
        position_ids: places within the row or within the document, from 0, [B, L], int64.
        padding: true where a packed row holds nothing, which routers do not count, [B, L], bool. A
            token whose label has a weight of 0 is no padding: a prompt is read like any other text.
            None: there is none.
        sequence_index: number of the document within its row, from 0, non-decreasing, [B, L],
            int32. Padding at the end of a row is one more, with weights of 0. None: the row is
            one sequence, whatever is in it. It is of the whole row on every context-parallel rank,
            since Mamba's states and the keys of attention are.
        source: number of the source of each row, [B], int64. None: there is one source only.
        token_extras: further fields by name, of each token: [B, L, ...]; context-parallel ranks
            hold their parts, as of tokens.
        row_extras: further fields by name, of each row: [B, ...]; whole on every context-parallel
            rank, whatever stands behind B.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    padding: Tensor | None = None
    sequence_index: Tensor | None = None
    source: Tensor | None = None
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)
    row_extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse padding that the model would not hear of.

        Raises:
            ValueError: if there is padding, but no sequence index that tells it from the documents.
        """
        if self.padding is not None and self.sequence_index is None:
            raise ValueError(
                "a batch with padding needs a sequence_index, in which padding is a document of "
                "its own"
            )

    def without_labels(self) -> "Batch":
        """Return the same batch with nothing in it that counts: no label, no token of a router."""
        padding = None if self.padding is None else torch.ones_like(self.padding)
        return replace(self, loss_weights=torch.zeros_like(self.loss_weights), padding=padding)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on `device`."""
        return self._map(lambda _, values: values.to(device, non_blocking=True))

    def part_of(self, rank: int, size: int) -> "Batch":
        """Return what one of `size` context-parallel ranks holds of each sequence, [B, L / size].

        The sequence index, the source and the extra fields of rows stay whole.

        Raises:
            ValueError: if the sequences do not split; see `ops.context`.
        """

        def cut(name: str, values: Tensor) -> Tensor:
            return values if name in _WHOLE else own_chunks(values, rank, size, dim=1)

        return self._map(cut)

    def by_name(self) -> dict[str, Any]:
        """Return the fields, of which `Batch(**fields)` makes the same batch again."""
        return {
            one.name: dict(value) if isinstance(value, Mapping) else value
            for one in fields(self)
            for value in (getattr(self, one.name),)
        }

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        def changed(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: change(name, one) for key, one in value.items()}
            return None if value is None else change(name, value)

        names = (one.name for one in fields(self))
        return Batch(**{name: changed(name, getattr(self, name)) for name in names})


@dataclass(frozen=True)
class RowIdentity:
    """Which row of a run it is.

    Attributes:
        number: of the row within its phase, or within the validation.
        position: tokens of the run before it; in a validation, tokens of the validation before it.
        split: train or validation.
        seed: of the run.
    """

    number: int
    position: int = 0
    split: Split = Split.train
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One sequence, field by field as in `Batch`, each without the axis B; source is [].

    Attributes:
        identity: which row it is; the same for every rank and in every resumed run.
    """

    tokens: Array
    labels: Array
    loss_weights: Array
    position_ids: Array
    padding: Array | None = None
    sequence_index: Array | None = None
    source: Array | None = None
    token_extras: Mapping[str, Array] = field(default_factory=dict)
    row_extras: Mapping[str, Array] = field(default_factory=dict)
    identity: RowIdentity = RowIdentity(0)

    def generator(self, purpose: str) -> np.random.Generator:
        """Return random numbers that depend on seed, split, row and purpose alone."""
        one = self.identity
        key = repr((purpose, one.seed, one.split.value, one.position, one.number))
        digest = hashlib.sha256(key.encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def without_labels(self) -> "Row":
        """Return the same row with nothing in it that counts; see `Batch.without_labels`."""
        padding = None if self.padding is None else np.ones_like(self.padding)
        return replace(self, loss_weights=np.zeros_like(self.loss_weights), padding=padding)


class RowTransform(Protocol):
    """Changes rows one by one; pure: equal rows give equal rows, and none is changed in place."""

    def __call__(self, row: Row) -> Row:
        """Return what stands for a row."""


class Sequences(Protocol):
    """Numbered rows of equal length, each as arrays by the name of a field of `Row`."""

    def fill(self, row: int) -> Fields:
        """Return the fields of a row, [L], or [] for its source."""


@dataclass(frozen=True)
class RowReader:
    """The rows of a phase or a validation by number, as transforms leave them.

    Attributes:
        sequences: the rows as they are read.
        transforms: what changes them, one after the other; none: they stay as they are.
        split: which part of the data they are.
        seed: of the run.
        start: tokens of the run before row 0.
    """

    sequences: Sequences
    transforms: Sequence[RowTransform] = ()
    split: Split = Split.train
    seed: int = 0
    start: int = 0

    def __call__(self, number: int) -> Row:
        """Read a row.

        Raises:
            UserError: if a transform returns something else than a row of this length.
        """
        given: dict[str, Any] = {**self.sequences.fill(number)}
        row = Row(**given)
        if not self.transforms:
            return row
        position = self.start + number * len(row.tokens)
        row = replace(row, identity=RowIdentity(number, position, self.split, self.seed))
        for transform in self.transforms:
            changed = transform(row)
            _require_same_form(row, changed, transform)
            row = replace(changed, identity=row.identity)
        return row


def _require_same_form(before: Row, after: object, transform: RowTransform) -> None:
    """Refuse what cannot stand for a row."""
    name = getattr(transform, "__name__", type(transform).__name__)
    if not isinstance(after, Row):
        raise _wrong(f"row transform {name} returned {type(after).__name__}; it must return a Row")
    for one in fields(Batch):
        was, now = getattr(before, one.name), getattr(after, one.name)
        if isinstance(now, Mapping):
            continue
        if (was is None) != (now is None) and one.name not in ("padding", "sequence_index"):
            raise _wrong(f"row transform {name} returned a row whose {one.name} is {_form(now)}")
        if was is not None and now is not None and _form(was) != _form(now):
            raise _wrong(
                f"row transform {name} returned {one.name} as {_form(now)}, and it got {_form(was)}"
            )
    length = len(after.tokens)
    for extra, values in after.token_extras.items():
        if values.shape[:1] != (length,):
            raise _wrong(
                f"row transform {name} returned token_extras {extra} of shape {values.shape}, but "
                f"the row has {length} tokens; what is not one of each token is of row_extras"
            )


def _form(values: Array | None) -> str:
    return "None" if values is None else f"{values.dtype} {list(values.shape)}"


def stack(rows: Sequence[Row]) -> Batch:
    """Join rows, each field [L], into one batch [B, L].

    Raises:
        UserError: if they have different fields, or an extra one of different shapes.
    """
    given: dict[str, Any] = {}
    for one in fields(Batch):
        values = [getattr(row, one.name) for row in rows]
        if isinstance(values[0], Mapping):
            given[one.name] = _stack_extras(values)
        elif any(value is not None for value in values):
            if any(value is None for value in values):
                raise _wrong(f"{one.name} is in some rows of a microbatch, and in others not")
            given[one.name] = torch.from_numpy(np.stack(values))
    return Batch(**given)


def _stack_extras(rows: Sequence[Mapping[str, Array]]) -> dict[str, Tensor]:
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if any(name not in row for row in rows):
            raise _wrong(f"extra field {name} is in some rows of a microbatch, and in others not")
        shapes = {row[name].shape for row in rows}
        if len(shapes) > 1:
            raise _wrong(
                f"extra field {name} has several shapes in one microbatch: "
                f"{', '.join(map(str, sorted(shapes)))}; fill the shorter ones up"
            )
        found[name] = torch.from_numpy(np.stack([row[name] for row in rows]))
    return found


def _wrong(text: str) -> UserError:
    error = UserError(text)
    error.of_content = True  # every rank that reads the row says so
    return error
