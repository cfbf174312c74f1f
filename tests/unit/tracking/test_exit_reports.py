"""From what processes said as they ended to the cause."""

from pathlib import Path

from hybrid_train.tracking import exit_reports
from hybrid_train.tracking.exit_reports import ExitReport, cause_of

LOST = "RuntimeError: Connection closed by peer [127.0.0.1]:4242"
TIMED_OUT = "RuntimeError: Timed out waiting 60000ms for recv operation to complete"


def lost(rank: int, text: str = LOST, time: float = 10.0) -> ExitReport:
    return ExitReport(rank, "lost", text, time, step=7, part="reduce", waits=True)


def told(rank: int, time: float = 11.0) -> ExitReport:
    text = f"rank {rank} was told to end by SIGTERM"
    return ExitReport(rank, "told", text, time, step=7, part="reduce")


def hung(rank: int, signs: int, *, waits: bool) -> ExitReport:
    stack = f'  File "a.py", line 1, in main\n    go()\n  File "b{rank}.py", line {rank}, in read\n'
    return ExitReport(
        rank, "hang", "silent for 8 s", 20.0, 7, "data", signs=signs, waits=waits, stack=stack
    )


def test_who_says_nothing_was_killed() -> None:
    cause = cause_of([lost(0), told(2)], processes=3, alive=9.0)
    assert (cause.kind, cause.ranks) == ("killed", (1,))
    assert cause.text == "rank 1 was killed, without a word; the others were in step 7 (reduce)"
    assert cause.time == 11.0


def test_all_are_killed_where_nobody_says_anything() -> None:
    cause = cause_of([], processes=2, alive=9.0)
    assert (cause.kind, cause.ranks, cause.time) == ("killed", (0, 1), 9.0)


def test_a_fault_of_ones_own_goes_before_what_follows_from_it() -> None:
    fault = ExitReport(2, "disk", "the disk is full: /x", 9.5, step=7, part="save")
    cause = cause_of([lost(0), told(1), fault], processes=4, alive=None)
    assert (cause.kind, cause.ranks) == ("disk", (2,))
    assert cause.text == "rank 2 in step 7 (save): the disk is full: /x"


def test_of_a_hang_the_late_process_is_named_with_its_place() -> None:
    waiting = [hung(rank, signs=50, waits=True) for rank in (0, 2)]
    cause = cause_of([*waiting, hung(1, signs=48, waits=False)], processes=3, alive=None)
    assert (cause.kind, cause.ranks) == ("hang", (1,))
    assert cause.text == 'rank 1 hung in step 7 (data) in File "b1.py", line 1, in read'


def test_a_process_that_is_stopped_cannot_speak_and_is_named_by_the_others() -> None:
    cause = cause_of([lost(0, TIMED_OUT)], processes=2, alive=None)
    assert (cause.kind, cause.ranks) == ("hang", (1,))


def test_a_signal_to_all_is_told() -> None:
    cause = cause_of([told(1, time=12), told(0, time=11)], processes=2, alive=None)
    assert (cause.kind, cause.text) == ("told", "rank 0 was told to end by SIGTERM")


def test_reports_and_crashes_are_read_from_disk(tmp_path: Path) -> None:
    exit_reports.folder(tmp_path, 3).mkdir(parents=True)
    exit_reports.leave(tmp_path, 3, lost(0))
    crash = 'Fatal Python error: Bus error\n\n  File "/x/hybrid_train/data/documents.py", line 1\n'
    exit_reports.crash_file(tmp_path, 3, 1).write_text(crash)
    exit_reports.crash_file(tmp_path, 3, 0).write_text("")
    reports = exit_reports.read(tmp_path, 3)
    assert [(one.rank, one.kind) for one in reports] == [(0, "lost"), (1, "data")]
    cause = cause_of(reports, processes=2, alive=None)
    assert cause.kind == "data"
    assert "Bus error: a data file was cut short" in cause.text
