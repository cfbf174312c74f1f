"""The runs of one command line: a command for every combination of the values.

`jobs/sweep.py` runs these commands one after the other; `jobs/submit.py` queues them as an array of
SLURM, on a machine without torch.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from hybrid_train.config import overrides
from hybrid_train.config.commands import ROOTS, root_of, setting
from hybrid_train.config.compose import compose
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.train import TrainJob

_NOT_IN_NAMES = re.compile(r"[^\w.+=-]+")  # of folders
_QUOTES = "'\""
_LONGEST_NAME = 120  # letters; file systems take 255 bytes


@dataclass(frozen=True)
class SweepRun:
    """One combination of the values.

    Attributes:
        words: the command that runs it.
        values: of the settings that differ between the runs, by their names.
        folder: of the run; None if the job has none.
    """

    words: Sequence[str]
    values: dict[str, str]
    folder: Path | None = None


def runs(name: str, lines: Sequence[str]) -> list[SweepRun]:
    """Return one run per combination; the run folder of each is `run_dir`/what differs.

    Raises:
        ConfigError: if any combination cannot run.
    """
    root = root_of(name)
    texts = [line for line in lines if line.partition("=")[0] in ROOTS[root].texts]
    combined = combinations([line for line in lines if line not in texts])
    differing = [_differing(one, combined) for one in combined]
    names = _folder_names(differing)
    listed, problems = [], []
    for combination, values, folder in zip(combined, differing, names, strict=True):
        try:
            job = compose(root, [*combination, *texts])
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        if isinstance(job, TrainJob):
            run_dir = f"{job.run_dir}/{folder}"
            given = [line for line in combination if not line.startswith("run_dir=")]
            words = command(name, [*given, setting("run_dir", run_dir), *texts])
            listed.append(SweepRun(words, values, Path(run_dir)))
        else:
            listed.append(SweepRun(command(name, [*combination, *texts]), values))
    if problems:
        raise ConfigError(problems)
    return listed


def _differing(combination: Sequence[str], combined: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return what one combination sets to other values than another does."""
    return {
        key: value
        for place, line in enumerate(combination)
        for key, _, value in [line.partition("=")]
        if any(other[place] != line for other in combined) and key != "run_dir"
    }


def _folder_names(differing: Sequence[dict[str, str]]) -> list[str]:
    """Name a folder for each run by what differs: seed=1_beta2=0.95.

    A name that would be too long, or that two runs would have, becomes the number of the run.
    """
    short = short_keys(list(differing[0])) if differing else {}
    names = [
        _NOT_IN_NAMES.sub(
            "-", "_".join(f"{short[key]}={value.strip(_QUOTES)}" for key, value in one.items())
        )
        for one in differing
    ]
    return [
        name if 0 < len(name) <= _LONGEST_NAME and names.count(name) == 1 else str(number)
        for number, name in enumerate(names)
    ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Leave the sections out of keys where the last word alone tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)
    }


def command(name: str, lines: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command that starts a job in a process of its own, or in several by torchrun."""
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    launcher = several if processes > 1 else []
    return [sys.executable, "-m", *launcher, "hybrid_train", *name.split(), *lines]


def combinations(lines: Sequence[str]) -> list[list[str]]:
    """Expand sweeps: ["a=1,2", "b=3"] -> [["a=1", "b=3"], ["a=2", "b=3"]]."""
    read = [overrides.parse(line, is_sweep=True) for line in lines]
    problems = [one for one in read if isinstance(one, Problem)]
    if problems:
        raise ConfigError(problems)
    parsed = [one for one in read if isinstance(one, Override)]
    return [list(one) for batch in BasicSweeper.split_arguments(parsed, None) for one in batch]
