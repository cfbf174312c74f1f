"""The root of a resumption: a run folder, which has all the settings."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from hybrid_train.schema.limits import FileName


@dataclass(kw_only=True)
class ResumeJob:
    """A run that goes on, or begins, with the config that lies in its folder."""

    run_dir: FileName = MISSING
    overrides: list[str] = field(default_factory=list)  # settings of `train`: train.tokens=2M
