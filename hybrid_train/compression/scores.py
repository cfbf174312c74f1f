"""How what tokens show of elements becomes scores: over tokens, over rows, over the processes.

    of a row    mean of |x|, root of the mean of x^2, or the variance, over its tokens
    score       mean of these over rows, or the root of the mean of their squares

Values are taken in float32 whatever the model computes in, and summed in float64. A row is the same
whoever reads it: what ranks hold of its tokens is summed before anything is made of the sums, so
the scores of every layout are those of one process. Tokens of an expert come from rows of many
ranks and do not know which; they are taken together, as those of one row.

Source: Minitron, arXiv:2407.14679, section 2.2 (aggregations).

Dimensions: S tokens of a row on this rank, B rows of a microbatch, C elements on this rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.schema.importance import OverRows, OverTokens
from hybrid_train.schema.problems import UserError

Finish = Callable[[Tensor, Tensor], Tensor]  # sums and counts of all processes -> scores


def moments(values: Tensor, over: OverTokens) -> Tensor:
    """Return what is summed of each token, [1 or 2, ...]; float64 where sums nearly cancel."""
    if over is OverTokens.mean:
        return values.float().abs()[None]
    if over is OverTokens.l2:
        return values.float().square()[None]
    values = values.double()
    return torch.stack([values, values.square()])


def num_moments(over: OverTokens) -> int:
    """Return how many sums there are of each element."""
    return 2 if over is OverTokens.variance else 1


def of_tokens(sums: Tensor, counts: Tensor, over: OverTokens) -> Tensor:
    """Return the number of each element; 0 where there are no tokens.

    Args:
        sums: of `moments` over tokens, [1 or 2, ..., C].
        counts: of the tokens, [...].
        over: how they become one.
    """
    means = sums / counts.clamp(min=1)[..., None]
    if over is OverTokens.mean:
        return means[0]
    if over is OverTokens.l2:
        return means[0].sqrt()
    return (means[1] - means[0].square()).clamp(min=0)


@dataclass(frozen=True)
class Spec:
    """What is summed up under one name; all processes have the same.

    Attributes:
        sums: their shape, of all processes together.
        counts: shape of the numbers of what they are sums of.
        finish: makes scores of both.
    """

    sums: tuple[int, ...]
    counts: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True)
class Part:
    """What this process holds of a name.

    Attributes:
        name: of the scores.
        where: place of its sums among those of all.
        counts_where: place of its counts.
        speaks: whether it is the one that tells these sums.
        tells_counts: likewise of the counts.
    """

    name: str
    where: tuple[slice | EllipsisType, ...] = (...,)
    counts_where: tuple[slice | EllipsisType, ...] = (...,)
    speaks: bool = True
    tells_counts: bool = True


class Ledger:
    """The sums of all names, those of this process until they are collected."""

    def __init__(self, specs: Mapping[str, Spec], device: torch.device) -> None:
        """Begin with none."""
        self.specs = specs
        self._device = device
        self._held: dict[str, tuple[Part, Tensor, Tensor]] = {}

    def add(self, part: Part, sums: Tensor, counts: Tensor) -> None:
        """Add what a microbatch has shown of this process's part."""
        _, before, count = self._held.get(part.name, (part, 0.0, 0.0))
        self._held[part.name] = (part, before + sums.double(), count + counts.double())

    def collect(self) -> dict[str, Tensor]:
        """Return the scores of every name, float32, on the CPU; every process calls this.

        Raises:
            UserError: on all processes, if one is not a finite number.
        """
        found = {}
        for name, spec in self.specs.items():  # one by one: all at once are as large as a layer
            sums, counts = self._whole(name, spec)
            found[name] = spec.finish(sums, counts).float().cpu()
        wrong = [name for name, scores in found.items() if not bool(scores.isfinite().all())]
        if wrong:
            error = UserError(
                f"scores of {wrong[0]} are not finite: the model has weights that are not, or "
                "numbers that overflow; take an earlier checkpoint"
            )
            error.on_all_ranks = True
            raise error
        return found

    def _whole(self, name: str, spec: Spec) -> tuple[Tensor, Tensor]:
        sums, counts = (
            torch.zeros(shape, dtype=torch.float64, device=self._device)
            for shape in (spec.sums, spec.counts)
        )
        if name in self._held:
            part, own, count = self._held[name]
            if part.speaks:
                sums[part.where] = own
            if part.tells_counts:
                counts[part.counts_where] = count
        both = torch.cat([sums.flatten(), counts.flatten()])
        dist.all_reduce(both)
        sums, counts = both.split([sums.numel(), counts.numel()])
        return sums.view(spec.sums), counts.view(spec.counts)


@dataclass(frozen=True)
class _Seen:
    part: Part
    sums: Tensor  # [1 or 2, B, C]
    tokens: Tensor  # of the rows on this rank, [B]
    is_split: bool  # tokens over the tensor ranks


class RowScores:
    """Sums up elements over the tokens of rows, then over rows."""

    def __init__(
        self, ledger: Ledger, groups: ProcessGroups, tokens: OverTokens, rows: OverRows
    ) -> None:
        """Take where sums go, and how they are made."""
        self._ledger, self._groups = ledger, groups
        self._tokens, self._rows = tokens, rows
        self._seen: list[_Seen] = []

    @staticmethod
    def spec(shape: tuple[int, ...], rows: OverRows) -> Spec:
        """Return the spec of elements in this shape."""

        def finish(sums: Tensor, counts: Tensor) -> Tensor:
            mean = sums / counts.clamp(min=1)
            return mean.sqrt() if rows is OverRows.l2 else mean

        return Spec(shape, (), finish)

    def see(self, part: Part, values: Tensor, counted: Tensor) -> None:
        """Take what tokens show.

        Args:
            part: whose elements they are.
            values: [S, B, C], or the tensor rank's part of the tokens.
            counted: which tokens count, [S, B], bool.
        """
        tokens = counted.sum(dim=0, dtype=torch.float64)
        is_split = len(values) < len(counted)
        if is_split:
            counted = counted.chunk(self._groups.tp.size())[self._groups.tp.rank()]
        found = moments(values, self._tokens)
        found = torch.where(counted[..., None], found, 0.0)
        sums = found.sum(dim=1, dtype=torch.float64)
        self._seen.append(_Seen(part, sums, tokens, is_split))

    def close(self) -> None:
        """Add up what was seen since the last call; ranks that share rows call this together."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        _all_reduce([one.sums for one in seen if one.is_split], self._groups.tp)
        _all_reduce([held for one in seen for held in (one.sums, one.tokens)], self._groups.cp)
        for one in seen:
            read = one.tokens > 0
            numbers = of_tokens(one.sums, one.tokens, self._tokens) * read[:, None]
            if self._rows is OverRows.l2:
                numbers = numbers.square()
            shape = self._own_shape(one.part, numbers.shape[-1])
            self._ledger.add(one.part, numbers.sum(dim=0).view(shape), read.sum())

    def _own_shape(self, part: Part, elements: int) -> tuple[int, ...]:
        """Return the shape of this rank's part: ranks divide the first axis."""
        rest = self._ledger.specs[part.name].sums[1:]
        return (elements // max(1, torch.Size(rest).numel()), *rest)


def _all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in one message, in place."""
    if not tensors or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([one.flatten() for one in tensors])
    dist.all_reduce(flat, group=group)
    for one, summed in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        one.copy_(summed.view(one.shape))
