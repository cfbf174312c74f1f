"""What every task owes: full marks for the oracle, none for no answer, choices without a bias."""

import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import cache

import pytest

from hybrid_train.evaluation.items import Item, Task
from hybrid_train.evaluation.tasks import TASKS, build_tasks
from hybrid_train.schema.evaluation import Tasks
from hybrid_train.schema.problems import UserError, collect
from tests.unit.evaluation.own_tasks import OWN, settings_of

ITEMS = 400
# Of chi-square with 3 degrees of freedom, 99.9 %: the seeds are fixed, so that none fails by luck.
CHI_SQUARE_3 = 16.27


@cache
def task(name: str) -> tuple[Task, Sequence[Item]]:
    (built,) = build_tasks([name], settings_of(name, items=ITEMS))
    return built, built.items()


def test_every_task_has_settings_and_a_class() -> None:
    no_lists_of_items = ["heldout", "decoding"]
    assert [field.name for field in fields(Tasks)] == [*no_lists_of_items, *TASKS]
    assert list(collect(Tasks())) == []


@pytest.mark.parametrize("name", OWN)
def test_a_task_has_as_many_items_as_asked_each_with_a_name(name: str) -> None:
    built, items = task(name)
    assert built.name == name
    assert len({item.name for item in items}) == len(items) == ITEMS


@pytest.mark.parametrize("name", OWN)
def test_a_task_follows_from_settings_and_seed(name: str) -> None:
    again, other = (
        build_tasks([name], settings_of(name, items=20, seed=seed))[0].items() for seed in (0, 1)
    )
    once = build_tasks([name], settings_of(name, items=20))[0].items()
    assert again == once
    assert not {(item.prompt, item.choices) for item in again} & {
        (item.prompt, item.choices) for item in other
    }


@pytest.mark.parametrize("name", OWN)
def test_the_answer_itself_has_full_marks(name: str) -> None:
    built, items = task(name)
    assert {built.grade(item, item.answer) for item in items} == {1.0}


@pytest.mark.parametrize("name", OWN)
def test_what_is_no_answer_has_none(name: str) -> None:
    built, items = task(name)
    drawn = random.Random(0)
    for item in items:
        noise = "".join(drawn.choices(string.ascii_letters + " \n", k=len(item.answer) + 3))
        everything = " ".join(dict.fromkeys([*(one.answer for one in items), *item.choices]))
        twice = f"{item.answer} {item.answer}"
        for text in ("", " ", noise, item.prompt, item.prompt + item.answer, everything, twice):
            assert built.grade(item, text) == 0, (item.name, text)
        assert {built.grade(item, one) for one in item.choices if one != item.answer} <= {0.0}


@pytest.mark.parametrize("name", sorted(set(OWN) - {"copying", "arithmetic"}))
def test_the_right_choice_stands_at_each_place_equally_often(name: str) -> None:
    items = task(name)[1]
    assert {len(item.choices) for item in items} == {4}
    counts = Counter(item.choices.index(item.answer) for item in items)
    expected = len(items) / 4
    assert sum((counts[place] - expected) ** 2 / expected for place in range(4)) < CHI_SQUARE_3


@pytest.mark.parametrize("name", sorted(set(OWN) - {"copying", "arithmetic"}))
def test_length_of_a_choice_does_not_tell_the_right_one(name: str) -> None:
    """Who takes the shortest, or the longest, is right about as often as by chance."""
    items = task(name)[1]
    for pick in (min, max):
        right = 0.0
        for item in items:
            length = pick(len(one) for one in item.choices)
            alike = [one for one in item.choices if len(one) == length]
            right += (item.answer in alike) / len(alike)
        # Four standard errors of a quarter of 400 items are 9 %.
        assert abs(right / len(items) - 0.25) < 0.09


@pytest.mark.parametrize("name", sorted(set(OWN) - {"copying", "arithmetic"}))
def test_prompt_and_choice_part_at_white_space(name: str) -> None:
    for item in task(name)[1]:
        assert item.prompt == item.prompt.rstrip() != ""
        assert all(choice[0].isspace() for choice in item.choices)


@pytest.mark.parametrize("name", ["copying", "recall", "brackets", "sums", "needle", "arithmetic"])
def test_a_limit_leaves_each_group_its_share(name: str) -> None:
    items = task(name)[1]
    groups = Counter(item.group for item in items)
    assert max(groups.values()) - min(groups.values()) <= 1
    assert len({item.group for item in items[: len(groups)]}) == len(groups) > 1


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'neddle' is no task; .*; nearest: needle"):
        build_tasks(["copying", "neddle"], Tasks())


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("needle", {"depths": []}, "depths = []: must name one group or more"),
        (
            "copying",
            {"words": [4, 4]},
            "words = [4, 4]: must name one group or more, none of them twice; nearest: [4]",
        ),
        ("recall", {"pairs": [4, 65]}, "pairs.1 = 65: must be at most keys"),
        ("sums", {"modulus": 3}, "modulus = 3: must be at least 4"),
        ("needle", {"depths": [float("nan")]}, "depths.0 = nan: must be a number from 0 to 1"),
        ("arithmetic", {"digits": [0]}, "digits.0 = 0: must be at least 1"),
    ],
)
def test_settings_out_of_bounds_are_problems(
    name: str, changes: dict[str, object], said: str
) -> None:
    (problem, *_) = collect(getattr(settings_of(name, **changes), name))
    assert said in str(problem)
