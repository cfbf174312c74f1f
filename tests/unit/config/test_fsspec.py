"""Faults of a network are tried again, others are sentences at once; nothing shows a credential."""

import errno
from collections.abc import Callable

import fsspec
import pytest

from hybrid_train.config.fsspec import Hints, doubling, file_system, patient, retried
from hybrid_train.schema.problems import UserError

URL = "s3://bucket/runs/a"
HINTS = Hints("check checkpoint.url", "or leave it out", "write", "written")


class NoCredentialsError(Exception):
    """By the name that botocore gives it."""


def failing(*errors: Exception) -> Callable[[], str]:
    left = iter(errors)

    def action() -> str:
        error = next(left, None)
        if error is not None:
            raise error
        return "done"

    return action


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("hybrid_train.config.fsspec.time.sleep", found.append)
    return found


def test_each_fault_that_another_try_follows_is_told(waited: list[float]) -> None:
    faults, told = [OSError("gone"), TimeoutError("late")], list[Exception]()
    action = failing(*faults)
    assert retried(URL, URL, action, doubling(4, 0.5), hints=HINTS, told=told.append) == "done"
    assert told == faults
    assert waited == [0.5, 1.0]


def test_after_the_last_try_the_fault_is_a_sentence(waited: list[float]) -> None:
    action = failing(*[OSError("gone")] * 3)
    with pytest.raises(UserError, match=rf"cannot write {URL}/x: gone \(3 tries\)"):
        retried(URL, f"{URL}/x", action, doubling(3, 0.5), hints=HINTS)
    assert len(waited) == 2


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def answer(code: str) -> Exception:
    error = Exception(code)
    error.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]  # as botocore does
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(URL), f"{URL} does not exist; check checkpoint.url"),
        (
            with_cause(FileNotFoundError("no such bucket"), answer("NoSuchBucket")),
            f"{URL} does not exist: there is no such bucket; check checkpoint.url",
        ),
        (PermissionError(errno.EACCES, "denied"), "may not be written: .*check the credentials"),
        (NoCredentialsError("none found"), "may not be written: none found; check the credentials"),
    ],
    ids=["missing", "bucket", "denied", "no credentials"],
)
def test_what_no_try_can_change_is_said_at_once(
    error: Exception, words: str, waited: list[float]
) -> None:
    with pytest.raises(UserError, match=words):
        retried(URL, URL, failing(error), doubling(4, 0.5), hints=HINTS)
    assert waited == []


def test_a_file_that_seems_missing_because_nobody_answers_is_tried_again() -> None:
    error = with_cause(FileNotFoundError(URL), ConnectionError("refused"))
    assert retried(URL, URL, failing(error), doubling(2, 0.5), hints=HINTS) == "done"


def test_no_message_shows_a_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-sesame")
    secret = "s3://user:sesame-sesame@bucket/a"
    for error in (OSError("signed with sesame-sesame"), PermissionError("sesame-sesame")):
        with pytest.raises(UserError) as caught:
            retried(secret, secret, failing(error), [], hints=HINTS)
        assert "sesame" not in str(caught.value)
        assert "<hidden>" in str(caught.value)


def test_patience_lasts_as_long_as_it_is_said_to_from_the_first_fault_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("hybrid_train.config.fsspec.time.monotonic", lambda: now[0])
    waits = []
    for wait_s in patient(60, first_wait_s=0.5, longest_s=15):
        waits.append(wait_s)
        now[0] += wait_s
    assert waits == [0.5, 1, 2, 4, 8, 15, 15, 14.5]
    assert sum(waits) == 60


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(UserError, match=r"Install s3fs.*pip install 'hybrid_train\[s3\]'"):
        file_system(URL, HINTS)
