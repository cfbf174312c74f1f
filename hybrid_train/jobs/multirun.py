"""Several runs from one command line: every combination of the values, one after the other."""

import subprocess
import sys
from collections.abc import Callable, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from hybrid_train.config import overrides
from hybrid_train.config.command_text import setting, typed
from hybrid_train.config.commands import ROOTS, root_of
from hybrid_train.config.compose import compose
from hybrid_train.config.launcher import require_alone
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.train import TrainJob


def plan(name: str, lines: Sequence[str]) -> Callable[[], int]:
    """Check every combination and return what runs them.

    Raises:
        UserError: under torchrun.
        ConfigError: if any combination cannot run.
    """
    require_alone("--multirun")
    listed = commands(name, lines)
    return lambda: run_all(listed)


def commands(name: str, lines: Sequence[str]) -> list[list[str]]:
    """Return one command per combination; run number n gets the run folder `run_dir`/n.

    Raises:
        ConfigError: if any combination cannot run.
    """
    root = root_of(name)
    texts = [line for line in lines if line.partition("=")[0] in ROOTS[root].texts]
    listed, problems = [], []
    for number, combination in enumerate(combinations([o for o in lines if o not in texts])):
        try:
            job = compose(root, [*combination, *texts])
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        own = [setting("run_dir", f"{job.run_dir}/{number}")] if isinstance(job, TrainJob) else []
        given = [line for line in combination if not (own and line.startswith("run_dir="))]
        listed.append(command(name, [*given, *own, *texts]))
    if problems:
        raise ConfigError(problems)
    return listed


def command(name: str, lines: Sequence[str]) -> list[str]:
    """Return the command that starts a job in a process of its own."""
    return [sys.executable, "-m", "hybrid_train", *name.split(), *lines]


def combinations(lines: Sequence[str]) -> list[list[str]]:
    """Expand sweeps: ["a=1,2", "b=3"] -> [["a=1", "b=3"], ["a=2", "b=3"]]."""
    read = [overrides.parse(line, is_sweep=True) for line in lines]
    problems = [one for one in read if isinstance(one, Problem)]
    if problems:
        raise ConfigError(problems)
    parsed = [one for one in read if isinstance(one, Override)]
    return [list(one) for batch in BasicSweeper.split_arguments(parsed, None) for one in batch]


def run_all(listed: Sequence[Sequence[str]]) -> int:
    """Run the commands one after the other; return the first exit code that is not 0."""
    codes = []
    for number, one in enumerate(listed):
        sys.stderr.write(f"run {number + 1} of {len(listed)}: {typed(*one[3:])}\n")
        codes.append(subprocess.run(one, check=False).returncode)
    failed = [str(number) for number, code in enumerate(codes) if code]
    if failed:
        sys.stderr.write(f"hybrid-train: these runs failed: {', '.join(failed)}\n")
    return next((code for code in codes if code), 0)
