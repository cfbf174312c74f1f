"""The flag --multirun: runs every combination of the values, one after the other, and compares."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from hybrid_train.config.commands import command, setting, typed
from hybrid_train.config.launcher import require_alone
from hybrid_train.jobs.help import console, show_numbers
from hybrid_train.jobs.multirun import SweepRun, runs, short_keys
from hybrid_train.jobs.run_state import RunState, look, show_or_dash
from hybrid_train.schema.problems import UserError

_HEADS = ("state", "step", "avg loss", "val loss")


def plan(name: str, lines: Sequence[str]) -> Callable[[], int]:
    """Check every combination and return what runs them.

    Raises:
        UserError: under torchrun.
        ConfigError: if any combination cannot run.
    """
    require_alone("--multirun")
    listed = runs(name, lines)
    return lambda: run_all(listed)


def run_all(listed: Sequence[SweepRun]) -> int:
    """Run the commands one after the other; return the first exit code that is not 0."""
    codes = []
    for number, one in enumerate(listed):
        sys.stderr.write(f"run {number + 1} of {len(listed)}: {typed(*one.words[3:])}\n")
        codes.append(subprocess.run(one.words, check=False).returncode)
    if any(one.folder for one in listed):
        _show(listed, codes)
    failed = [
        f"{one.folder.name if one.folder else number} (exit code {code})"
        for number, (one, code) in enumerate(zip(listed, codes, strict=True))
        if code
    ]
    if failed:
        sys.stderr.write(f"hybrid-train: these runs failed: {', '.join(failed)}\n")
    return next((code for code in codes if code), 0)


def _show(listed: Sequence[SweepRun], codes: Sequence[int]) -> None:
    """Print a line a run, the lowest validation loss first, and how to compare them."""
    keys = list(dict.fromkeys(key for one in listed for key in one.values))
    found = [
        (one, _state(one), code) for one, code in zip(listed, codes, strict=True) if one.folder
    ]
    found.sort(key=lambda run: _loss(run[1]))
    rows = [tuple(_row(*run, keys)) for run in found]
    page = console()
    page.print()
    heads = [*(short_keys(keys)[key] for key in keys), *_HEADS, "folder"]
    show_numbers(page, rows, heads, words=len(keys) + 1)
    place = next(one.folder.parent for one in listed if one.folder)
    compare = command("report", setting("run_dir", place))
    page.print(f"\nTheir curves over each other: {compare}", soft_wrap=True)


def _state(one: SweepRun) -> RunState | None:
    """Look at a run; None if it never got as far as its folder."""
    try:
        return look(one.folder) if one.folder else None
    except UserError:
        return None


def _loss(state: RunState | None) -> float:
    """Return what runs are sorted by: the validation loss, or infinity where there is none."""
    loss = state.last_of("validation_loss") if state else None
    return float("inf") if loss is None or loss != loss else loss  # noqa: PLR0124  NaN


def _row(one: SweepRun, state: RunState | None, code: int, keys: Sequence[str]) -> Iterator[str]:
    yield from (one.values.get(key, "-") for key in keys)
    if code:
        yield f"failed, exit code {code}"
    else:
        yield state.state if state else "no run folder"
    yield f"{state.step:,}" if state else "-"
    yield show_or_dash("smoothed_loss", state.smoothed_loss if state else None)
    yield show_or_dash("validation_loss", state.last_of("validation_loss") if state else None)
    yield str(one.folder)
