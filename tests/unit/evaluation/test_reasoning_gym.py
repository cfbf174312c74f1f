"""The gateway to reasoning-gym: its tasks, its scorers, and the holes in some of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hybrid_train.evaluation import reasoning_gym as gateway
from hybrid_train.evaluation.reasoning_gym import REFUSED, ReasoningGymTask
from hybrid_train.evaluation.tasks import build_tasks
from hybrid_train.runtime import optional
from hybrid_train.schema.evaluation import ReasoningGym, Tasks
from hybrid_train.schema.problems import UserError

is_installed = optional.look("reasoning_gym", "reasoning-gym").state is optional.State.working
needs_library = pytest.mark.skipif(not is_installed, reason="reasoning-gym is not installed")
SHORT = ("chain_sum", "gcd", "lcm", "spell_backward", "number_sequence", "basic_arithmetic")
SLOW = {"knight_swap"}  # twelve seconds for its first items


def test_without_the_library_the_task_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optional, "available", lambda name: False)
    with pytest.raises(UserError, match="needs reasoning_gym, which is not installed; install it"):
        build_tasks(["reasoning_gym"], Tasks())


@needs_library
@pytest.mark.parametrize("name", SHORT)
def test_the_stored_answer_is_right_alone_or_between_marks(name: str) -> None:
    task = ReasoningGymTask(ReasoningGym(name=name, items=100))
    items = task.items()
    assert {task.grade(item, item.answer) for item in items} == {1.0}
    marked = (task.grade(item, f"So: <answer>{item.answer}</answer>") for item in items)
    assert set(marked) == {1.0}


@needs_library
@pytest.mark.parametrize("name", SHORT)
def test_what_is_no_answer_has_none(name: str) -> None:
    task = ReasoningGymTask(ReasoningGym(name=name, items=100))
    items = task.items()
    answers = list(dict.fromkeys(item.answer for item in items))
    for item in items:
        everything = "\n".join([*(one for one in answers if one != item.answer), item.answer])
        for text in ("", " ", "qzx qzx", item.prompt, everything, f"{item.prompt} {item.answer}"):
            assert task.grade(item, text) == 0


@needs_library
def test_items_follow_from_name_difficulty_and_seed() -> None:
    settings = ReasoningGym(items=5, seed=3, difficulty={"min_terms": "2", "max_terms": "2"})
    items = ReasoningGymTask(settings).items()
    assert items == ReasoningGymTask(settings).items()
    assert items != ReasoningGymTask(ReasoningGym(items=5, seed=4)).items()
    assert all(item.prompt.count(" - ") + item.prompt.count(" + ") == 1 for item in items)
    assert {item.group for item in items} == {"chain_sum"}


@needs_library
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ReasoningGym(name="game_of_life_halting"), "refused: its scorer gives full marks to any"),
        (ReasoningGym(name="rush_hour"), "is refused: it stores no answers"),
        (ReasoningGym(name="chain_sums"), "has no such task; nearest: chain_sum"),
        (ReasoningGym(difficulty={"min_term": "2"}), "no such attribute; nearest: min_terms"),
        (ReasoningGym(difficulty={"size": "2"}), "chain_sum has no such attribute"),
        (ReasoningGym(difficulty={"min_terms": "0"}), "min_terms: 0}: chain_sum refuses it"),
        (ReasoningGym(difficulty={"min_terms": "few"}), "min_terms: few}: chain_sum refuses it"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_items_are_made(
    settings: ReasoningGym, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        ReasoningGymTask(settings)


@needs_library
def test_a_scorer_that_raises_gives_nothing_and_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = ReasoningGymTask(ReasoningGym(name="prime_factorization", items=3))
    with caplog.at_level(logging.WARNING):
        assert [task.grade(item, "no number") for item in task.items()] == [0, 0, 0]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the scorer of prime_factorization raised ValueError")


@contextmanager
def accepted(name: str) -> Iterator[None]:
    """Let a task that is refused by name be tried all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway, "REFUSED", {key: REFUSED[key] for key in REFUSED if key != name})
        yield


@needs_library
@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"composite"}))
def test_a_hole_would_be_found_if_nobody_knew_of_it(name: str) -> None:
    with accepted(name):
        task = ReasoningGymTask(ReasoningGym(name=name, items=30))
        with pytest.raises(UserError, match="is refused: its scorer gives"):
            task.items()


@needs_library
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its unclosed files
def test_every_other_task_of_the_library_has_a_scorer_without_holes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import reasoning_gym

    names = sorted(set(reasoning_gym.factory.DATASETS) - set(REFUSED) - SLOW)
    assert len(names) > 90
    for name in names:
        task = ReasoningGymTask(ReasoningGym(name=name, items=12))
        assert all(task.grade(item, "") == 0 for item in task.items()), name
    assert capsys.readouterr().out == ""
