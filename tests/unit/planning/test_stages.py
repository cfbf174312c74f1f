"""Cuts against all cuts there are; stages against the counts of the whole model."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hybrid_train.anatomy import counts
from hybrid_train.anatomy.layers import main_layers
from hybrid_train.planning.memory import Held
from hybrid_train.planning.stages import (
    Stage,
    balanced,
    bubble_share,
    cut,
    describe,
    layer_costs,
    most_work_share,
    stages,
)
from hybrid_train.schema.model import Attention, Mamba, Mlp, Model, Moe, Mtp
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import Train, TrainJob

ROWS = 64
COSTS = st.lists(st.integers(1, 20), min_size=2, max_size=9)


def job(pattern: str, pipeline: int = 1, virtual_pipeline: int = 1, length: int = 16) -> TrainJob:
    return TrainJob(
        run_dir="unused",
        train=Train(tokens="1M", sequence_length=length, global_batch=8),
        model=Model(
            pattern=pattern,
            hidden_size=32,
            attention=Attention(heads=4, kv_heads=2, head_dim=8),
            mamba=Mamba(heads=4, head_dim=16, state_size=8, groups=2),
            mlp=Mlp(intermediate_size=64),
            moe=Moe(experts=8, top_k=2, intermediate_size=40, shared_intermediate_size=56),
            mtp=Mtp(),
        ),
        parallel=Parallel(pipeline=pipeline, virtual_pipeline=virtual_pipeline),
    )


def all_cuts(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    """Every way to take consecutive layers, at least one a stage."""
    for inner in combinations(range(1, num_layers), num_stages - 1):
        yield [end - start for start, end in pairwise([0, *inner, num_layers])]


def sums(costs: Sequence[int], lengths: Sequence[int]) -> list[int]:
    ends = [0, *accumulate(lengths)]
    return [sum(costs[start:end]) for start, end in pairwise(ends)]


@given(costs=COSTS, pipeline=st.integers(1, 4), virtual=st.integers(1, 3))
def test_no_cut_has_a_cheaper_costliest_stage(
    costs: list[int], pipeline: int, virtual: int
) -> None:
    assume(pipeline * virtual <= len(costs))
    found = balanced(costs, pipeline, virtual)
    assert len(found) == pipeline * virtual
    assert sum(found) == len(costs)
    assert min(found) >= 1
    least = min(max(sums(costs, lengths)) for lengths in all_cuts(len(costs), len(found)))
    assert max(sums(costs, found)) == least


@given(costs=COSTS, pipeline=st.integers(1, 5))
def test_of_the_best_cuts_it_is_the_most_even(costs: list[int], pipeline: int) -> None:
    # With one stage a rank; a last layer dearer than a whole stage has an aim of its own.
    assume(pipeline <= len(costs))
    assume(costs[-1] * pipeline <= sum(costs))
    found = balanced(costs, pipeline)
    least = max(sums(costs, found))
    squares = [
        sum(cost**2 for cost in sums(costs, lengths))
        for lengths in all_cuts(len(costs), pipeline)
        if max(sums(costs, lengths)) == least
    ]
    # The mean is the same for all, so the least sum of squares is the least distance from it.
    assert sum(cost**2 for cost in sums(costs, found)) == min(squares)


@given(costs=COSTS, pipeline=st.integers(2, 3), virtual=st.integers(2, 3))
def test_of_the_best_cuts_its_stages_are_nearest_to_equal_ranks(
    costs: list[int], pipeline: int, virtual: int
) -> None:
    assume(pipeline * virtual <= len(costs))
    rank = sum(costs) / pipeline
    # What the rank of a dear last stage has left, its other stages share.
    last = max(rank / virtual, costs[-1])
    aims = [rank / virtual] * (pipeline * virtual)
    aims[pipeline - 1 :: pipeline] = [max(0.0, rank - last) / (virtual - 1)] * virtual
    aims[-1] = last

    def distance(lengths: list[int]) -> float:
        pairs = zip(sums(costs, lengths), aims, strict=True)
        return sum((cost - aim) ** 2 for cost, aim in pairs)

    found = balanced(costs, pipeline, virtual)
    least = max(sums(costs, found))
    best = [
        distance(lengths)
        for lengths in all_cuts(len(costs), len(found))
        if max(sums(costs, lengths)) == least
    ]
    assert distance(found) == pytest.approx(min(best))


def test_equal_layers_are_shared_equally() -> None:
    assert balanced([5] * 12, 4) == [3, 3, 3, 3]
    assert balanced([5] * 12, 2, 3) == [2] * 6


def test_the_rank_of_a_dear_last_stage_gets_less_in_its_others() -> None:
    # Ranks: 0 has stages 0 and 2, 1 has stages 1 and 3. A head of 6 leaves rank 1 a layer.
    assert balanced([2, 2, 2, 2, 2, 6], 2, 2) == [2, 1, 2, 1]


def test_more_stages_than_layers_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="3 layers cannot make 4 stages"):
        balanced([1, 1, 1], 2, 2)


def test_the_costs_of_the_layers_are_the_flops_of_the_model() -> None:
    whole = job("MEM*M-/*E/*E")
    count = counts.flops_per_token(whole.model, ROWS, whole.train.sequence_length)
    costs = layer_costs(whole, ROWS)
    assert sum(costs) == count.forward
    last = counts.layer_flops(main_layers(whole.model)[-1], whole.train.sequence_length)
    assert costs[-1] == last + count.by_kind["head"] + count.by_kind["mtp"]
    assert costs[0] == costs[2] == count.by_kind["M"] / 3


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (3, 1), (2, 3), (3, 2)])
def test_the_stages_share_the_model_without_rest(pipeline: int, virtual: int) -> None:
    cut_job = job("MEM*M-MEM*M-/*E/*E", pipeline, virtual)
    planned = stages(cut_job, ROWS)
    assert [stage.rank for stage in planned] == [*range(pipeline)] * virtual
    assert "".join(stage.layers for stage in planned) == "MEM*M-MEM*M-"
    total = counts.flops_per_token(cut_job.model, ROWS, 16).forward
    assert sum(stage.flops for stage in planned) == total
    assert sum(stage.cost for stage in planned) / len(planned) == pytest.approx(1)
    assert planned[0].contents.startswith("embedding + ")
    assert planned[-1].contents.endswith(" + head + MTP")


def test_cuts_of_the_user_are_kept() -> None:
    by_hand = job("M|EM*M-/*E", pipeline=2)
    assert str(cut(by_hand, ROWS)) == "M|EM*M-/*E"
    assert [stage.layers for stage in stages(by_hand, ROWS)] == ["M", "EM*M-"]
    by_cost = job("MEM*M-/*E", pipeline=2)
    assert str(cut(by_cost, ROWS)) != "M|EM*M-/*E"


def test_a_longer_sequence_makes_attention_dearer_and_moves_the_cut() -> None:
    short, long = (cut(job("**--------", 2, length=length), ROWS) for length in (16, 4096))
    assert len(long.stages[0]) < len(short.stages[0])


def test_a_larger_vocabulary_makes_the_last_stage_shorter() -> None:
    small, large = (cut(job("----------", 2), rows) for rows in (16, 1024))
    assert len(large.stages[1]) < len(small.stages[1])


def test_stages_are_described_in_a_line_each() -> None:
    lines = describe(stages(job("M|-", pipeline=2), ROWS))
    assert len(lines) == 2
    assert lines[0].startswith("stage 0 on pipeline rank 0: embedding + M, cost ")
    assert lines[1].startswith("stage 1 on pipeline rank 1: - + head, cost ")
    # MLP, its norm, the final norm, and the head.
    assert lines[1].endswith(f"{(2 * 32 * 64 + 32 + 32 + ROWS * 32) / 1000:.3g}k parameters")


def test_the_bubble_is_that_of_the_paper() -> None:
    assert bubble_share(1, 1, 7) == 0
    assert bubble_share(4, 1, 12) == pytest.approx(3 / 15)
    # arXiv:2104.04473, section 2.2: (P - 1) / (V M) of the time of the work.
    share = bubble_share(4, 2, 12)
    assert share / (1 - share) == pytest.approx(3 / (2 * 12))


def planned(flops: Sequence[int], num_ranks: int) -> list[Stage]:
    held = Held(0)
    return [Stage(n % num_ranks, "M", "M", cost, 1.0, held) for n, cost in enumerate(flops)]


@pytest.mark.parametrize(("pipeline", "virtual", "batches"), [(1, 1, 3), (4, 1, 6), (3, 4, 9)])
def test_with_equal_stages_the_rest_of_the_step_is_the_bubble(
    pipeline: int, virtual: int, batches: int
) -> None:
    equal = planned([7] * (pipeline * virtual), pipeline)
    share = most_work_share(equal, batches)
    assert share == pytest.approx(1 - bubble_share(pipeline, virtual, batches))


@given(flops=st.lists(st.integers(1, 9), min_size=1, max_size=5), batches=st.integers(1, 8))
def test_no_schedule_of_one_stage_a_rank_works_a_larger_part_of_the_step(
    flops: list[int], batches: int
) -> None:
    took = time_of_1f1b(flops, batches)
    share = 3 * batches * sum(flops) / len(flops) / took
    assert share <= most_work_share(planned(flops, len(flops)), batches) * (1 + 1e-9)


def time_of_1f1b(flops: Sequence[int], batches: int) -> int:
    """Run the schedule by its dependencies: P - 1 - r forwards ahead, then one of each in turn."""
    last = len(flops) - 1
    orders = []
    for rank in range(len(flops)):
        ahead = min(last - rank, batches)
        steady = [(kind, ahead + n if kind else n) for n in range(batches) for kind in (1, 0)]
        order = [(1, n) for n in range(ahead)]
        orders.append(order + [(kind, n) for kind, n in steady if n < batches])
    done: dict[tuple[int, int, int], int] = {}
    clocks, places = [0] * len(flops), [0] * len(flops)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank, order in enumerate(orders):
            if places[rank] == len(order):
                continue
            forward, batch = order[places[rank]]
            if forward:
                needs = (1, rank - 1, batch) if rank else None
            else:
                needs = (0, rank + 1, batch) if rank < last else (1, rank, batch)
            if needs is not None and needs not in done:
                continue
            start = max(clocks[rank], done[needs] if needs else 0)
            clocks[rank] = start + flops[rank] * (1 if forward else 2)
            done[forward, rank, batch] = clocks[rank]
            places[rank] += 1
    return max(clocks)


def test_the_simulated_schedule_of_equal_stages_takes_the_time_of_the_paper() -> None:
    # (M + P - 1) forward and backward passes; so the simulation above can be trusted.
    assert time_of_1f1b([5, 5, 5, 5], batches=6) == 3 * 5 * (6 + 3)


def test_tied_or_repeated_weights_change_no_cost() -> None:
    apart = job("MEM*M-/*E/*E", pipeline=3)
    tied = dataclasses.replace(apart.model, tie_embeddings=True, mtp=Mtp(repeated_block=False))
    other = dataclasses.replace(apart, model=tied)
    assert layer_costs(apart, ROWS) == layer_costs(other, ROWS)
