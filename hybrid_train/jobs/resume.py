"""The job `resume`: a run whose folder has its config, as `hybrid-train submit` leaves it."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.config import compose, frozen, overrides, yaml_files
from hybrid_train.jobs import train
from hybrid_train.jobs.run_folder import may_change
from hybrid_train.schema.job_roots import ResumeJob
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.train import TrainJob


def run(job: ResumeJob) -> int:
    """Train what the folder says, with what is given beside it; return the exit code of `train`.

    Raises:
        UserError: if the folder has no config, or something is given that cannot change when a run
            goes on (`jobs/run_folder.py`).
        ConfigError: if it does not fit this version, or these processes.
    """
    return train.run(frozen.reload(Path(job.run_dir), lambda run: changed(run, job.overrides)))


def changed(job: TrainJob, lines: Sequence[str]) -> TrainJob:
    """Apply overrides to the config of a run; whether they may change is seen in its folder.

    Raises:
        ConfigError: if they do not fit.
    """
    groups = compose.group_names("train")
    given = overrides.read(lines, groups)
    problems, config = given.problems, OmegaConf.structured(job)
    for choice in given.groups:
        group = choice.key_or_group
        if choice.is_delete() or not may_change(f"{group}."):
            rule = "a run goes on with what it began with; give single settings"
            problems.append(Problem(group, str(choice.input_line).partition("=")[2], rule))
            continue
        part = compose.draft("train", [str(choice.input_line)])
        problems += part.problems
        config[group] = part.config[group]
    for override in given.values:
        problems += overrides.set_value(config, override, groups)
    if problems:
        raise ConfigError(problems)
    try:
        return cast("TrainJob", OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError([yaml_files.explained(error)]) from error
