"""What the user sees: lines without a terminal, a bar with one."""

import itertools
import re

import pytest

from hybrid_train.tracking.console import Console
from hybrid_train.tracking.metrics import smoothed_loss


def metrics(step: int, **more: float) -> dict[str, float]:
    figures = {"tokens": 1000 * step, "loss": 5.0, "lr": 3e-4, "grad_norm": 0.9}
    return figures | {"tokens_per_s": 12_300.0, "step_time_s": 0.081, "mfu": 0.341} | more


def plain(total: int = 25_000, interval: int = 10, seconds_a_step: float = 2.0) -> Console:
    ticks = itertools.count(0.0, seconds_a_step)
    return Console(total, interval=interval, terminal=False, clock=lambda: next(ticks))


def steps_shown(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^step +(\d+)", text, re.MULTILINE)]


def test_a_line_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    plain().log(1, metrics(1))
    assert capsys.readouterr().out == (
        "step      1  tokens      1k/25k  loss  5.0000  avg loss  5.0000  lr 3.00e-04  "
        "grad_norm  0.900  tok/s  12.3k  time   81ms  MFU  34.1%  left 48s\n"
    )


def test_lines_come_at_first_and_last_step_and_every_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = plain()
    for step in range(1, 26):
        console.log(step, metrics(step))
    console.close()
    assert steps_shown(capsys.readouterr().out) == [1, 10, 20, 25]


def test_a_resumed_run_shows_its_own_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(25_000, start_tokens=12_000, interval=10, terminal=False)
    for step in range(13, 16):
        console.log(step, metrics(step))
    assert steps_shown(capsys.readouterr().out) == [13]


def test_the_last_step_of_a_stopped_run_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = plain()
    for step in range(1, 15):
        console.log(step, metrics(step))
    console.close()
    console.close()  # twice does no harm
    assert steps_shown(capsys.readouterr().out) == [1, 10, 14]


def test_the_average_loss_goes_on_where_a_resumed_run_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [5.0] * 29
    console = Console(60_000, start_tokens=29_000, losses=before, terminal=False)
    console.log(30, metrics(30, loss=8.0))
    (line,) = capsys.readouterr().out.splitlines()
    assert "loss  8.0000  avg loss  6.0000" in line  # of three steps, a tenth of thirty
    assert smoothed_loss([*before, 8.0]) == 6.0


def test_validation_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = plain()
    for step in range(1, 6):
        more = {"validation_loss": 4.5, "unigram_loss": 6.1} if step == 4 else {}
        console.log(step, metrics(step, **more))
    lines = capsys.readouterr().out.splitlines()
    assert steps_shown("\n".join(lines)) == [1, 4]
    assert lines[-1].endswith("val 4.5000  unigram 6.1000")


def test_columns_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    console = plain(total=2_000_000_000, interval=1)
    for step, tokens in [(1, 1_000), (99, 123_000), (12345, 1_230_000_000)]:
        console.log(step, metrics(step, tokens=tokens, loss=12.0 / step, tokens_per_s=10.0 * step))
    lines = capsys.readouterr().out.splitlines()
    for label in ("tokens ", "loss ", "lr ", "grad_norm ", "tok/s ", "MFU ", "left "):
        assert len({line.index(label) for line in lines}) == 1, label


def test_time_left_follows_the_recent_rate_and_not_the_slow_first_step() -> None:
    times = iter([0.0, 100.0, *itertools.accumulate(itertools.repeat(1.0, 60), initial=101.0)])
    console = Console(200_000, interval=1000, terminal=False, clock=lambda: next(times))
    for step in range(1, 61):
        console.log(step, metrics(step))
    assert console.seconds_left() == pytest.approx(140)  # 140 steps of one second each


def test_time_left_of_a_resumed_run_counts_only_what_it_did_itself() -> None:
    times = iter([0.0, 1.0])
    console = Console(20_000, start_tokens=9_000, terminal=False, clock=lambda: next(times))
    console.log(10, metrics(10))
    assert console.seconds_left() == pytest.approx(10)


def test_a_message_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        console = Console(1000, terminal=terminal)
        console.say("saved [bold]step 5[/bold] " + "x" * 200)
        console.close()
        assert "saved [bold]step 5[/bold] " + "x" * 200 + "\n" in capsys.readouterr().out


def test_a_terminal_has_a_bar_with_figures_and_lines_at_validation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    console = Console(10_000, terminal=True)
    console.log(4, metrics(4, validation_loss=4.5))
    console.log(5, metrics(5))
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out.replace("\r", "\n"))
    assert re.search(r"^step +4 .* val 4.5000$", text, re.MULTILINE)
    last = text.rstrip().splitlines()[-1]
    assert last.lstrip().startswith("50%")
    assert "step 5  avg loss 5.0000  tok/s 12.3k  time 81ms  MFU 34.1%  left" in last


def test_without_a_terminal_no_control_codes_are_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(10_000)  # pytest's standard output is no terminal
    console.log(1, metrics(1))
    console.close()
    assert "\x1b" not in capsys.readouterr().out
