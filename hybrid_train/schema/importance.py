"""Settings of the job `importance`: which rows are read, and what of a model is scored by them."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.schema.evaluation import Asking
from hybrid_train.schema.limits import Batch, Count, CountOrNone, FileName, Length, Processes
from hybrid_train.schema.parallel import Degrees
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Runtime

_PUBLISHED_ROWS = 128  # of layers taken out: MiniPuzzle, arXiv:2504.03624


class ScoreSource(enum.Enum):
    """What scores are made of; the last two read no rows: the first is held against them."""

    activations = "activations"  # what rows of text show
    weights = "weights"  # L2 norms of the weights of an element, summed over its tensors
    random = "random"  # by the seed


class OverTokens(enum.Enum):
    """How what the tokens of a row show of an element becomes one number."""

    mean = "mean"  # of the absolute values
    l2 = "l2"  # root of the mean of the squares
    variance = "variance"


class OverRows(enum.Enum):
    """How the numbers of all rows become the score of an element."""

    l2 = "l2"  # root of the mean of the squares
    mean = "mean"


class ExpertMetric(enum.Enum):
    """What says how much an expert mattered."""

    output = "output"  # mean norm of its output, weighed by the router, over its tokens
    without = "without"  # MSE of the output of its layer without it; runs a layer for each expert


class LayerMetric(enum.Enum):
    """What says how much a layer mattered; all but the first run the model without it."""

    cosine = "cosine"  # 1 - cos of what goes into it and what comes out
    hidden_mse = "hidden_mse"  # of the last hidden states
    hidden_nmse = "hidden_nmse"  # the same, divided by the mean of their squares
    logits_mse = "logits_mse"
    logits_nmse = "logits_nmse"
    loss = "loss"  # nats per token more than with it; the log of the ratio of perplexities
    accuracy = "accuracy"  # on the first of `tasks`: how much less it is


@dataclass(kw_only=True)
class Layout(Degrees):
    """How a model is split that reads whole rows, and is not trained."""

    virtual_pipeline: Processes = 1  # model chunks of a pipeline stage
    context: Processes = 1


@dataclass(kw_only=True)
class ImportanceJob(Asking):
    """Forward passes over rows of text that score every part of a model at once."""

    checkpoint: FileName = MISSING  # a run folder, one checkpoint of it, or the URL of either
    output: FileName = MISSING  # new folder of the ranking
    scores: ScoreSource = ScoreSource.activations
    rows: Count = 1024
    sequence_length: Length | None = None  # tokens of a row; null: as the run was trained
    microbatch: Batch = 1  # rows of one pass of one data-parallel rank
    files: list[FileName] = field(default_factory=list)  # prefixes; empty: train data of the run
    over_tokens: OverTokens = OverTokens.mean
    over_rows: OverRows = OverRows.l2
    mtp_norms: bool = True  # norms in MTP blocks count for the hidden channels, too
    experts: ExpertMetric = ExpertMetric.output
    layers: list[LayerMetric] = field(default_factory=lambda: [LayerMetric.cosine])
    layer_rows: Count | None = None  # rows read without a layer; null: 128, or all that there are
    iterative: CountOrNone = 0  # layers taken out one after the other, by each of `layers`
    blocks: list[Count] = field(default_factory=list)  # lengths of blocks taken out as one
    together: Count = 1  # neighbours taken out as one, and counted as one by these two: 2 of *-*-*-
    parallel: Layout = field(default_factory=Layout)
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        for number, one in enumerate(self.layers):
            if one in self.layers[:number]:
                yield Problem("layers", one.value, "is there twice")
        asks = LayerMetric.accuracy in self.layers
        if asks and len(self.task_names) != 1:
            rule = "must name one task, on which layers=[accuracy] measures"
            yield Problem("tasks", self.task_names, rule, "[next_line]")
        if self.task_names and not asks:
            rule = "is read by layers=[accuracy] alone, which is not asked for"
            yield Problem("tasks", self.task_names, rule, "[]")
        if self.layer_rows is not None and self.layer_rows > self.rows:
            yield Problem("layer_rows", self.layer_rows, "must be at most rows", self.rows)
        if self.removals and not self.reads_rows:
            rule = f"takes layers out, and scores={self.scores.value} runs no model"
            yield Problem("layers", self.removals[0].value, rule, "[cosine]")
        yield from self._without_removals()

    def _without_removals(self) -> Iterator[Problem]:
        """Say which setting of layers that are taken out has none."""
        without: list[tuple[str, object, object]] = [
            ("blocks", self.blocks, []), ("iterative", self.iterative, 0),
            ("together", self.together, 1),
        ]  # fmt: skip
        asked = [one for one in without if one[1] != one[2]]
        if asked and not self.removals:
            (name, value, none), *_ = asked
            rule = "needs one of `layers` that takes layers out: all but cosine do"
            yield Problem(name, value, rule, none)

    @property
    def reads_rows(self) -> bool:
        """Whether the model runs over rows."""
        return self.scores is ScoreSource.activations

    @property
    def rows_without(self) -> int:
        """How many rows are read without a layer."""
        return min(_PUBLISHED_ROWS, self.rows) if self.layer_rows is None else self.layer_rows

    @property
    def removals(self) -> list[LayerMetric]:
        """The metrics that take layers out."""
        return [one for one in self.layers if one is not LayerMetric.cosine]
