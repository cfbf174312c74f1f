"""Settings of the job `importance`: which rows are read, and what of a model is scored by them."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.evaluation import Asking
from hybrid_train.schema.limits import Count, CountOrNone, FileName, Length, Range
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Runtime


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


Microbatch = Annotated[int, Range(1, 4096)]


@dataclass(kw_only=True)
class ImportanceJob(Asking):
    """Forward passes over rows of text that score every part of a model at once."""

    checkpoint: FileName = MISSING  # a run folder, one checkpoint of it, or the URL of either
    output: FileName = MISSING  # new folder of the ranking
    rows: Count = 1024
    sequence_length: Length | None = None  # tokens of a row; null: as the run was trained
    microbatch: Microbatch = 1  # rows of one pass of one data-parallel rank
    files: list[FileName] = field(default_factory=list)  # prefixes; empty: train data of the run
    over_tokens: OverTokens = OverTokens.mean
    over_rows: OverRows = OverRows.l2
    mtp_norms: bool = True  # norms in MTP blocks count for the hidden channels, too
    experts: ExpertMetric = ExpertMetric.output
    layers: list[LayerMetric] = field(default_factory=lambda: [LayerMetric.cosine])
    layer_rows: Count = 128  # rows that the model reads without a layer, at most `rows`
    iterative: CountOrNone = 0  # layers taken out one after the other, by each of `layers`
    blocks: list[Count] = field(default_factory=list)  # lengths of blocks taken out as one
    parallel: Parallel = field(default_factory=Parallel)
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
        if (self.blocks or self.iterative) and not self.removals:
            name, value = ("blocks", self.blocks) if self.blocks else ("iterative", self.iterative)
            rule = "needs one of `layers` that takes layers out: all but cosine do"
            yield Problem(name, value, rule, "[]" if self.blocks else 0)
        if self.parallel.fsdp:
            rule = "must be false: frozen weights are not wrapped; use tensor, pipeline or expert"
            yield Problem("parallel.fsdp", True, rule, False)
        if self.parallel.dispatcher.is_flex:
            rule = "must be alltoall or allgather, which leave the weights of experts as they are"
            yield Problem("parallel.dispatcher", self.parallel.dispatcher.value, rule, "alltoall")

    @property
    def removals(self) -> list[LayerMetric]:
        """The metrics that take layers out."""
        return [one for one in self.layers if one is not LayerMetric.cosine]
