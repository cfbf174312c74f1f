"""Cuts the layers of a model into pipeline stages of near-equal cost, and says what each costs.

With P pipeline ranks that run V stages each in turn (interleaved schedule), the layers make P * V
stages, in the order of the model; rank r runs the stages r, r + P, r + 2P, ...

The cost of a stage is its part of `counts.flops_per_token`: each layer by its kind and sizes; the
head and every MTP depth, which run on the last stage. The embedding, on the first, is a look-up and
multiplies nothing. A backward pass costs twice its forward pass everywhere, so it changes no cut.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.layers import main_layers
from hybrid_train.planning.memory import Held, held, held_in_fp8, memory
from hybrid_train.schema.pattern import Pattern, parse
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import counted, show_tokens


@dataclass(frozen=True)
class Stage:
    """Consecutive layers that one pipeline rank runs in one go."""

    rank: int  # of the pipeline
    layers: str
    contents: str  # the layers, and what stands before and behind them
    flops: int  # of a forward pass, per token
    cost: float  # the same as a part of the mean stage
    held: Held  # parameters of one process


def stages(job: TrainJob, vocab_rows: int) -> list[Stage]:
    """Return the stages of a checked job, in the order of the model.

    Args:
        job: the job.
        vocab_rows: rows of the embedding as they are stored, so padded.
    """
    pattern, parallel = cut(job, vocab_rows), job.parallel
    all_layers, ends = main_layers(job.model), list(accumulate(map(len, pattern.stages)))
    costs = layer_costs(job, vocab_rows)
    mean = sum(costs) / len(ends)
    found = []
    for number, (layers, end) in enumerate(zip(pattern.stages, ends, strict=True)):
        first, last = number == 0, end == len(costs)
        flops = sum(costs[end - len(layers) : end])
        held_here = all_layers[end - len(layers) : end]
        own = held(job.model, parallel, held_here, vocab_rows, first=first, last=last)
        in_fp8 = held_in_fp8(job, range(end - len(layers) + 1, end + 1))
        found.append(
            Stage(
                rank=number % parallel.pipeline,
                layers=layers,
                contents=_contents(pattern, layers, first=first, last=last),
                flops=flops,
                cost=flops / mean,
                held=replace(own, in_fp8=in_fp8),
            )
        )
    return found


def _contents(pattern: Pattern, layers: str, *, first: bool, last: bool) -> str:
    before = ["embedding"] if first else []
    behind = ["head", *["MTP"] * bool(pattern.mtp)] if last else []
    return " + ".join([*before, layers, *behind])


def held_of_rank(found: Sequence[Stage], rank: int) -> Held:
    """Return what one process of a pipeline rank holds: the parameters of all its stages."""
    return sum((stage.held for stage in found if stage.rank == rank), Held(0))


def most_kept(job: TrainJob, processes: int, vocab_rows: int) -> int:
    """Return the bytes that a process keeps on the pipeline rank that keeps most."""
    planned = stages(job, vocab_rows)
    held_here = [held_of_rank(planned, rank) for rank in range(job.parallel.pipeline)]
    return max(memory(job, one, processes).total for one in held_here)


def describe(found: Sequence[Stage]) -> list[str]:
    """Return the stages as lines of a log."""
    return [
        f"stage {number} on pipeline rank {stage.rank}: {stage.contents}, "
        f"cost {stage.cost:.2f} of the mean, {show_tokens(stage.held.total)} parameters"
        for number, stage in enumerate(found)
    ]


def bubble_share(pipeline: int, virtual_pipeline: int, num_microbatches: int) -> float:
    """Return the part of a step in which a rank waits for the first and the last microbatches.

        (P - 1) / (V M + P - 1), for M microbatches and stages of equal cost

    Source: Narayanan et al., arXiv:2104.04473, section 2.2: the bubble is (P - 1) / (V M) of the
    time that the work takes.
    """
    return (pipeline - 1) / (virtual_pipeline * num_microbatches + pipeline - 1)


def most_work_share(planned: Sequence[Stage], num_microbatches: int) -> float:
    """Return the part of a step that the mean rank can work at most, in any order of the stages.

    Rank r cannot begin before the stages in front of it have run once, nor end before they have
    run backwards once: a step takes at least M times the work of rank r and once that of the
    stages 0 ... r - 1. For stages of equal cost this is 1 - `bubble_share`.

    Args:
        planned: all stages, in the order of the model.
        num_microbatches: M.
    """
    num_ranks = 1 + max(stage.rank for stage in planned)
    of_rank = [0] * num_ranks
    for stage in planned:
        of_rank[stage.rank] += stage.flops
    before = accumulate((stage.flops for stage in planned), initial=0)
    step = max(num_microbatches * own + wait for own, wait in zip(of_rank, before, strict=False))
    return num_microbatches * sum(of_rank) / num_ranks / step


def cut(job: TrainJob, vocab_rows: int) -> Pattern:
    """Return the pattern with its cuts: those that the user wrote, or cuts of near-equal cost."""
    pattern, parallel = parse(job.model.pattern), job.parallel
    if pattern.is_cut:
        return pattern
    costs = layer_costs(job, vocab_rows)
    return pattern.cut(balanced(costs, parallel.pipeline, parallel.virtual_pipeline))


def layer_costs(job: TrainJob, vocab_rows: int) -> list[int]:
    """Return the FLOPs per token of each main layer; head and MTP count with the last one."""
    model, length = job.model, job.train.sequence_length
    costs = [counts.layer_flops(layer, length) for layer in main_layers(model)]
    behind = counts.flops_per_token(model, vocab_rows, length).by_kind
    costs[-1] += behind["head"] + behind.get("mtp", 0)
    return costs


def balanced(costs: Sequence[int], pipeline: int, virtual_pipeline: int = 1) -> list[int]:
    """Return how many layers each stage takes.

    No cut has a cheaper costliest stage, since a schedule moves at the pace of that. Of all such
    cuts this is the nearest, in squares, to pipeline ranks of equal cost: where the head makes the
    last stage dear, its rank gets less to do in its other ones.

    Equal ranks come second: in a simulation of core's interleaved order for the sizes of the
    Nemotron family, cuts that made them equal with dearer stages were slower.

    Args:
        costs: of each layer, positive.
        pipeline: P, ranks of the pipeline.
        virtual_pipeline: V, stages of each rank.

    Raises:
        ValueError: if there are more stages than layers.
    """
    num_stages = pipeline * virtual_pipeline
    if num_stages > len(costs):
        raise ValueError(f"{counted(len(costs), 'layer')} cannot make {num_stages} stages")
    sums = [0, *accumulate(costs)]
    limit = _smallest_limit(costs, sums, num_stages)
    # Layers taken by the stages so far -> the smallest sum of squares, and how many each took.
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for aim in _aims(costs, pipeline, virtual_pipeline):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (squares, lengths) in reached.items():
            for end in range(start + 1, len(costs) + 1):
                cost = sums[end] - sums[start]
                if cost > limit:
                    break
                total = squares + (cost - aim) ** 2
                if end not in longer or total < longer[end][0]:
                    longer[end] = (total, (*lengths, end - start))
        reached = longer
    return list(reached[len(costs)][1])


def _smallest_limit(costs: Sequence[int], sums: Sequence[int], num_stages: int) -> int:
    """Return the least possible cost of the costliest stage."""
    runs = sorted({behind - before for before, behind in combinations(sums, 2)})
    return runs[bisect_left(runs, True, key=lambda limit: _fits(costs, num_stages, limit))]


def _fits(costs: Sequence[int], num_stages: int, limit: int) -> bool:
    """Tell whether stages up to a limit are enough: fill one after the other."""
    used, room = 0, 0
    for cost in costs:
        if cost > limit:
            return False
        if cost > room:
            used, room = used + 1, limit
        room -= cost
    return used <= num_stages


def _aims(costs: Sequence[int], pipeline: int, virtual_pipeline: int) -> list[float]:
    """Return what each stage would cost with ranks of equal cost."""
    rank = sum(costs) / pipeline
    last = max(rank / virtual_pipeline, costs[-1])
    others = max(0.0, rank - last) / max(1, virtual_pipeline - 1)  # stages of the last rank
    of_round = [rank / virtual_pipeline] * (pipeline - 1)
    return [*([*of_round, others] * (virtual_pipeline - 1)), *of_round, last]
