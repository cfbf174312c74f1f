"""What processes say: the main one all, the others their warnings with the rank in front."""

import logging
from collections.abc import Iterator

import pytest

from hybrid_train.runtime import logs

LOGGER = logging.getLogger("hybrid_train")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    before = LOGGER.level, LOGGER.propagate, LOGGER.handlers
    yield
    logs.say_through(None)
    LOGGER.setLevel(before[0])
    LOGGER.propagate, LOGGER.handlers = before[1:]


def start(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> logging.Logger:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    logs.start_logging()
    return logging.getLogger("hybrid_train.some.part")


def test_main_process_says_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = start(monkeypatch, 0, 1)
    logger.info("hello")
    logger.warning("careful")
    assert capsys.readouterr().err == "hello\ncareful\n"


def test_other_processes_warn_and_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = start(monkeypatch, 2, 4)
    logger.info("hello")
    logger.warning("careful")
    assert capsys.readouterr().err == "[rank 2] careful\n"


def test_a_progress_bar_can_take_the_messages_and_give_them_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = start(monkeypatch, 0, 1)
    taken: list[str] = []
    logs.say_through(taken.append)
    logger.info("one")
    logs.say_through(None)
    logger.info("two")
    assert taken == ["one"]
    assert capsys.readouterr().err == "two\n"


def test_starting_twice_says_things_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, 0, 1)
    start(monkeypatch, 0, 1).info("hello")
    assert capsys.readouterr().err == "hello\n"
