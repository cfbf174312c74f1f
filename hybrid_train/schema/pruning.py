"""What a smaller model keeps of its parent: sizes, depth, or how many parameters; job and edit."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, ClassVar

from omegaconf import MISSING

from hybrid_train.schema.extension import EditSettings
from hybrid_train.schema.layer_ranges import RULE, is_range
from hybrid_train.schema.limits import (
    Count,
    CountOrNone,
    FileName,
    Name,
    Parameters,
    Range,
    Share,
    Size,
)
from hybrid_train.schema.model import (
    SECTIONS,
    AttentionSizes,
    LayerRule,
    MambaSizes,
    MlpSizes,
    MoeSizes,
)
from hybrid_train.schema.names import nearest_key
from hybrid_train.schema.problems import Problem

DEPTH = "depth"  # in Cut.shrink
MASK_RANKING = "ranking"  # folder in that of a masked run: what its mask was chosen by
# What `share` and `budget` can make smaller, by its name in the model.
WIDTHS = (
    "hidden_size",
    "mlp.intermediate_size",
    "mamba.heads",
    "moe.experts",
    "moe.intermediate_size",
    "moe.shared_intermediate_size",
    "moe.latent_size",
    "mamba.head_dim",
    "attention.heads",
    "attention.kv_heads",
)


@dataclass(kw_only=True)
class CutMoe(MoeSizes):
    """Sizes of the expert layers; null: as the parent's."""

    latent_size: Size | None = None


@dataclass(kw_only=True)
class CutSizes:
    """Sizes of the child; null: as the parent's. A layer that is smaller already stays so."""

    hidden_size: Size | None = None
    attention: AttentionSizes = field(default_factory=AttentionSizes)
    mamba: MambaSizes = field(default_factory=MambaSizes)
    mlp: MlpSizes = field(default_factory=MlpSizes)
    moe: CutMoe = field(default_factory=CutMoe)
    layers: list[LayerRule] = field(default_factory=list)  # main layers, counted in the parent

    @property
    def given(self) -> dict[str, int]:
        """The sizes for all layers, by their names in the model: "mlp.intermediate_size"."""
        values: dict[str, Any] = {name: attrgetter(name)(self) for name in WIDTHS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class Depth:
    """Which main layers of the parent stay: by list, by count, or all but a block of neighbours.

    Layers count from 1. What is not named by a list is chosen by the scores of the ranking.
    """

    together: Count = 1  # neighbours that stay or go as one, and count as one below: 2 of *-*-*-
    drop: list[str] = field(default_factory=list)  # depth.drop=[3,17-32]: all others stay
    keep: list[str] = field(default_factory=list)  # the other way round
    layers: Count | None = None  # so many stay, those that matter most
    mamba: CountOrNone | None = None  # so many of a kind stay; null: chosen with the others
    attention: CountOrNone | None = None
    mlp: CountOrNone | None = None
    moe: CountOrNone | None = None
    block: Count | None = None  # so many neighbours go, those that matter least together
    metric: Name | None = None  # of the ranking: cosine, ...; null: the only one that it has

    @property
    def of_kinds(self) -> dict[str, int]:
        """How many layers stay of the kinds that have a number of their own, by letter."""
        numbers = {letter: getattr(self, name) for letter, name in SECTIONS.items()}
        return {letter: number for letter, number in numbers.items() if number is not None}

    @property
    def ways(self) -> dict[str, object]:
        """What is set, by name; of these ways to choose layers one can be taken."""
        by_count = self.layers if self.layers is not None else self.of_kinds or None
        named = {"drop": self.drop or None, "keep": self.keep or None, "block": self.block}
        return {name: one for name, one in {**named, "layers": by_count}.items() if one is not None}

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        first, *others = [*self.ways, ""]
        for other in others[:-1]:
            rule = f"must be left out beside depth.{first}: each says which layers stay"
            yield Problem(other, self.ways[other], rule)
        for name in ("drop", "keep"):
            for number, text in enumerate(getattr(self, name)):
                if not is_range(text):
                    yield Problem(f"{name}.{number}", text, RULE, "1")
        if self.layers is not None and sum(self.of_kinds.values()) > self.layers:
            rule = f"must be at least {sum(self.of_kinds.values())}, the layers of single kinds"
            yield Problem("layers", self.layers, rule, sum(self.of_kinds.values()))
        if self.together > 1 and self.of_kinds:
            rule = "must be 1 beside a number of layers of one kind: those do not go together"
            yield Problem("together", self.together, rule, 1)


class MtpBlocks(enum.Enum):
    """What becomes of the blocks of multi-token prediction."""

    keep = "keep"  # cut along with the layers
    drop = "drop"


@dataclass(kw_only=True)
class Cut:
    """How a model is made smaller.

    With `share` or `budget` the sizes in `shrink` that nothing else fixes are searched: all widths
    by about the same share; layers go only where widths at their narrowest are still too many.
    """

    model: CutSizes = field(default_factory=CutSizes)
    depth: Depth = field(default_factory=Depth)
    mtp: MtpBlocks = MtpBlocks.keep
    share: Annotated[float, Range(1e-4, 1)] | None = None  # of the parent's parameters, kept
    budget: Parameters | None = None  # of the child at most: 4.5B
    shrink: list[str] = field(
        default_factory=lambda: [
            *("hidden_size", "mlp.intermediate_size", "mamba.heads", "moe.experts"),
            *("moe.intermediate_size", "moe.shared_intermediate_size", DEPTH),
        ]
    )
    narrowest: Share = 0.5  # share of a width that the search leaves at least
    multiple: Size | None = None  # of widths in channels; null: 8, and a coarser one in the search

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.share is not None and self.budget is not None:
            rule = "must be null beside share: both say how many parameters stay"
            yield Problem("budget", self.budget, rule, "null")
        known = (*WIDTHS, DEPTH)
        for number, name in enumerate(self.shrink):
            if name not in known:
                rule = f"must be one of {', '.join(known)}"
                yield Problem(f"shrink.{number}", name, rule, nearest_key(name, known))
        if "attention.kv_heads" in self.shrink:
            yield from self._heads_that_follow()
        if not self.shrink:
            yield Problem("shrink", "[]", "must name at least one size", "[hidden_size]")
        if self.asks_nothing:
            rule = "must be set, or budget, or a size of model, or depth, or mtp=drop"
            yield Problem("share", "null", rule, 0.8)

    def _heads_that_follow(self) -> Iterator[Problem]:
        """Where groups are searched, the heads are those of the groups that are left."""
        rule = "must not be there beside attention.kv_heads in shrink, whose heads go with it"
        if "attention.heads" in self.shrink:
            yield Problem("shrink", "attention.heads", rule)
        if self.model.attention.heads is not None:
            yield Problem("model.attention.heads", self.model.attention.heads, rule, "null")

    @property
    def asks_nothing(self) -> bool:
        """Whether the child would be the parent."""
        sizes = self.model.given or self.model.layers
        wanted = self.share is not None or self.budget is not None
        return not (sizes or wanted or self.depth.ways or self.mtp is MtpBlocks.drop)


@dataclass(kw_only=True)
class PruneJob(Cut):
    """A smaller model out of a checkpoint: a run folder that trains, generates and exports."""

    checkpoint: FileName = MISSING  # a run folder, or one checkpoint of it
    ranking: FileName | None = None  # of that checkpoint (`importance`); null: no score is needed
    output: FileName = MISSING  # new run folder
    dry_run: bool = False  # print the sizes and counts, and write nothing


@dataclass(kw_only=True)
class Mask(EditSettings, Cut):
    """Lets the model of a run compute what a child of this cut would; its weights stay as they are.

    The run begins with the checkpoint that the ranking is of.
    """

    implementation: ClassVar[str] = "hybrid_train.compression.mask:mask_of_run"
    kind: str = "mask"
    ranking: FileName | None = None  # of the model (`importance`); null: no score is needed


EDITS: dict[str, type[EditSettings]] = {"mask": Mask}  # ours, by the word that `edits` lists
