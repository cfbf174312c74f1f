"""The job `resume`: a run whose folder has its config, as `launch/submit.py` leaves it."""

from pathlib import Path

from hybrid_train.config import compose
from hybrid_train.config.schema.resume import ResumeJob
from hybrid_train.jobs import train


def run(job: ResumeJob) -> int:
    """Train what the folder says; return the exit code of `train`.

    Raises:
        UserError: if the folder has no config.
        ConfigError: if it does not fit this version, or these processes.
    """
    return train.run(compose.reload(Path(job.run_dir)))
