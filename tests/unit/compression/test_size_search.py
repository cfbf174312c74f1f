"""Sizes for a number of parameters: against all that there are, and at the ends."""

import itertools
from dataclasses import replace

import pytest

from hybrid_train.anatomy.counts import parameters
from hybrid_train.compression.choosing import choose
from hybrid_train.schema.model import Model
from hybrid_train.schema.problems import ConfigError
from hybrid_train.schema.pruning import Cut, CutSizes, Depth
from tests.rankings import METRIC, random_ranking, with_scores
from tests.tiny import tiny_job

ROWS = 64
PARENT = tiny_job().model  # MEM*M-/*E/*E: hidden 32, ffn 64, 4 experts of 32
TOTAL = parameters(PARENT, ROWS).total


def searched(cut: Cut, parent: Model = PARENT) -> Model:
    return choose(parent, random_ranking(parent), cut, ROWS).model


STEP, WIDEST = 4, (32, 64, 32)  # hidden channels, neurons of MLPs, of experts
THREE = ["hidden_size", "mlp.intermediate_size", "moe.intermediate_size"]


def count(hidden: int, mlp: int, expert: int) -> int:
    sections = {
        "mlp": replace(PARENT.mlp, intermediate_size=mlp),
        "moe": replace(PARENT.moe, intermediate_size=expert),
    }
    return parameters(replace(PARENT, hidden_size=hidden, **sections), ROWS).total


def near(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes a step up or down, as far as they are legal."""
    steps = [
        [one for one in (size - STEP, size, size + STEP) if widest // 2 <= one <= widest]
        for size, widest in zip(sizes, WIDEST, strict=True)
    ]
    return list(itertools.product(*steps))


@pytest.mark.parametrize("share", [0.9, 0.75, 0.7, 0.6])
def test_near_equal_shares_of_all_widths_no_combination_is_nearer(share: float) -> None:
    found = searched(Cut(share=share, multiple=STEP, shrink=THREE))
    sizes = (found.hidden_size, found.mlp.intermediate_size, found.moe.intermediate_size)
    most = int(share * TOTAL)
    evens = [
        tuple(max(widest // 2, int(part * widest) // STEP * STEP) for widest in WIDEST)
        for part in (step / 64 for step in range(32, 65))
    ]
    even = max((one for one in evens if count(*one) <= most), key=lambda one: count(*one))
    best = max(number for one in near(even) if (number := count(*one)) <= most)
    assert best <= count(*sizes) <= most
    wider = [one for one in near(sizes) if sum(one) == sum(sizes) + STEP and min(
        a - b for a, b in zip(one, sizes, strict=True)) == 0]  # fmt: skip
    assert wider
    assert min(count(*one) for one in wider) > most, "no width could be larger by a step"


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_no_width_could_be_larger_by_a_step(share: float) -> None:
    found, most = searched(Cut(share=share)), int(share * TOTAL)
    assert parameters(found, ROWS).total <= most
    assert found.pattern == PARENT.pattern
    larger = []
    for section, name, step, top in (
        ("", "hidden_size", 8, 32), ("mlp", "intermediate_size", 8, 64), ("mamba", "heads", 2, 4),
        ("moe", "experts", 1, 4), ("moe", "intermediate_size", 8, 32),
        ("moe", "shared_intermediate_size", 8, 48),
    ):  # fmt: skip
        one = replace(found)
        if section:
            setattr(one, section, replace(getattr(found, section)))
        owner = getattr(one, section) if section else one
        if getattr(owner, name) < top:
            setattr(owner, name, getattr(owner, name) + step)
            larger.append(parameters(one, ROWS).total)
    assert larger
    assert min(larger) > most


def test_attention_latent_and_head_width_stay_unless_they_are_named() -> None:
    found = searched(Cut(share=0.5))
    assert found.attention == PARENT.attention
    assert found.moe.latent_size == PARENT.moe.latent_size
    assert found.mamba.head_dim == PARENT.mamba.head_dim
    named = searched(Cut(share=0.9, shrink=["attention.kv_heads", "moe.latent_size"]))
    assert (named.attention.kv_heads, named.attention.heads) == (1, 2)
    assert named.hidden_size == PARENT.hidden_size


def test_what_is_given_stays_as_given() -> None:
    sizes = CutSizes(hidden_size=24)
    found = searched(Cut(share=0.6, model=sizes, depth=Depth(drop=["5"])))
    assert found.hidden_size == 24
    assert found.pattern == "MEM*-/*E/*E"
    assert parameters(found, ROWS).total <= 0.6 * TOTAL


def test_layers_go_only_where_the_narrowest_widths_are_too_many() -> None:
    narrowest = Cut(share=0.9, shrink=["hidden_size"])
    fewest = fewest_of(replace(narrowest, share=0.01))
    assert (
        searched(Cut(budget=str(fewest), shrink=["hidden_size", "depth"])).pattern == "MEM*M-/*E/*E"
    )
    scores = with_scores(random_ranking(PARENT), {f"layers.{METRIC}": [5, 1, 6, 4, 3, 2]})
    cut = Cut(budget=str(fewest - 1), shrink=["hidden_size", "depth"], multiple=1)
    shorter = choose(PARENT, scores, cut, ROWS)
    assert shorter.model.pattern == "MM*M-/*E/*E", "the layer that matters least went"
    assert shorter.model.hidden_size > 16, "and the widths take what is left"
    assert shorter.parameters < fewest


def test_layers_that_go_together_go_together_in_the_search() -> None:
    parent = replace(PARENT, pattern="*-*-*-")
    scores = with_scores(random_ranking(parent), {f"layers.{METRIC}": [9, 0, 3, 3, 8, 0]})
    cut = Cut(share=0.85, shrink=["depth"], depth=Depth(together=2))
    child = choose(parent, scores, cut, ROWS)
    assert [one.parent.number for one in child.selection.layers] == [1, 2, 5, 6]


def fewest_of(cut: Cut) -> int:
    """The number that a refusal of a cut names."""
    with pytest.raises(ConfigError) as refused:
        searched(cut)
    (problem,) = refused.value.problems
    if cut.budget is not None:
        assert isinstance(problem.nearest, int)
        return problem.nearest
    assert isinstance(problem.nearest, float)
    searched(replace(cut, share=problem.nearest))
    return parameters(searched(replace(cut, share=problem.nearest)), ROWS).total


def test_a_budget_that_nothing_meets_is_refused_with_the_least_that_something_does() -> None:
    fewest = fewest_of(Cut(budget="5k"))
    found = searched(Cut(budget=str(fewest)))
    assert parameters(found, ROWS).total == fewest
    assert found.pattern.index("/") == 1, "one layer is left"
    with pytest.raises(ConfigError):
        searched(Cut(budget=str(fewest - 1)))


def test_a_refusal_says_what_was_searched() -> None:
    with pytest.raises(ConfigError, match="no width may be searched, 5 layers that nothing lets"):
        searched(Cut(share=0.3, shrink=["depth"], depth=Depth(drop=["1"])))
    with pytest.raises(ConfigError, match=r"hidden_size at 75% \(narrowest\), 6 layers that"):
        searched(Cut(share=0.3, shrink=["hidden_size"], narrowest=0.75))
