"""Several runs: which folders a command names, what each is called beside the others, a line each.

Nothing here needs torch.
"""

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hybrid_train.config.frozen import FROZEN_NAME
from hybrid_train.jobs.help import show_left_out, show_numbers
from hybrid_train.jobs.run_state import RunState, look
from hybrid_train.schema.listed import listed_paths
from hybrid_train.schema.problems import UserError
from hybrid_train.tracking.history import FAILED
from hybrid_train.tracking.metrics import show, show_duration

DEEPEST = 3  # folders between the one that is named and a run; a study has one
HEADS = ("run", "state", "step", "tokens", "avg loss", "val loss", "tok/s", "left")
_WORDS = 2  # of these columns hold words


@dataclass(frozen=True)
class RunList:
    """The runs that a command names.

    Attributes:
        folders: of the runs, by the name that tells them apart; in the order of the names.
        place: the folder that has all of them below it.
        alone: whether one run was asked for, by its own folder.
    """

    folders: Mapping[str, Path]
    place: Path
    alone: bool

    def look(self) -> tuple[dict[str, RunState], dict[str, str]]:
        """Read the states of the runs, and why those that are left out cannot be read.

        Raises:
            UserError: if none can be read.
        """
        states: dict[str, RunState] = {}
        left_out: dict[str, str] = {}
        for name, folder in self.folders.items():
            try:
                states[name] = look(folder)
            except UserError as error:
                if self.alone:
                    raise
                left_out[name] = str(error)
        if not states:
            raise UserError("; ".join(left_out.values()))
        return states, left_out


def named(texts: Sequence[str]) -> RunList:
    """Find the runs that a command line names: run folders, folders of runs, globs.

    Raises:
        UserError: if one of them is no run and has none below it.
    """
    paths = [Path(path) for text in listed_paths(texts) for path in _expanded(text)]
    folders = list(dict.fromkeys(folder for path in paths for folder in _runs_of(path)))
    alone = len(paths) == 1 and folders == paths
    place = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    place = place.parent if len(folders) == 1 else place
    if len(paths) == 1 and not alone:
        place = paths[0]
    names = {os.path.relpath(folder.absolute(), place.absolute()): folder for folder in folders}
    return RunList({name: names[name] for name in sorted(names, key=natural)}, place, alone)


def _expanded(text: str) -> list[str]:
    text = os.path.expanduser(text)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    found = sorted(glob.glob(text))
    if not found:
        raise UserError(f"run_dir = {text}: nothing matches it")
    return [one for one in found if os.path.isdir(one)] or found


def _runs_of(path: Path) -> list[Path]:
    """Return the path, if it is a run folder, or the run folders below it.

    Raises:
        UserError: if there is none.
    """
    if (path / FROZEN_NAME).is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is no run folder: there is no such folder")
    found = list(_below(path, DEEPEST))
    if not found:
        raise UserError(
            f"{path} is not a run folder: it has no {FROZEN_NAME}, nor has a folder in it"
        )
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for one in sorted(folder.iterdir()):
        if not one.is_dir() or one.name.startswith("."):
            continue
        if (one / FROZEN_NAME).is_file():
            yield one  # what a run has written is not searched
        elif depth:
            yield from _below(one, depth - 1)


def natural(name: str) -> list[tuple[bool, float, str]]:
    """Return what sorts names as people do, 2 before 10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name)
    return [(n % 2 == 0, float(part) if n % 2 else 0.0, part) for n, part in enumerate(parts)]


def show_runs(page: Console, states: Mapping[str, RunState], left_out: Mapping[str, str]) -> None:
    """Print a line a run, and a sentence for each that failed or cannot be read."""
    show_numbers(page, [_line(name, one) for name, one in states.items()], HEADS, words=_WORDS)
    for name, why in failures(states.items()):
        page.print(f"\n{name} failed: {why}", soft_wrap=True)
    show_left_out(page, left_out)


def failures(states: Iterable[tuple[str, RunState]]) -> Iterator[tuple[str, str]]:
    """Yield name and cause of the runs that failed."""
    for name, state in states:
        if state.state == FAILED:
            yield name, state.why or "nobody knows why"


def _line(name: str, state: RunState) -> tuple[str, ...]:
    left = state.seconds_left
    return (
        name,
        state.state,
        f"{state.step:,}",
        show("tokens", state.tokens),
        shown("smoothed_loss", state.smoothed_loss),
        shown("validation_loss", state.last_of("validation_loss")),
        shown("tokens_per_s", state.last_of("tokens_per_s")),
        "-" if left is None else show_duration(left),
    )


def shown(name: str, value: float | None) -> str:
    """Write a metric that a run may not have."""
    return show(name, value) if value is not None and math.isfinite(value) else "-"
