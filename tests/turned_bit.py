"""A hook that turns one bit of a weight on one process, for the tests."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hybrid_train.runtime import ranks
from hybrid_train.schema.extension import HookSettings
from hybrid_train.training.loop import Hook


@dataclass(kw_only=True)
class Settings(HookSettings):
    """Where and when."""

    implementation: ClassVar[str] = "tests.turned_bit:TurnABit"
    kind: str = "tests.turned_bit:Settings"
    step: int = 3
    rank: int = 1


class TurnABit(Hook):
    """Turns the last bit of the first number of the first weight behind a step."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def step_end(self, run: Any, report: Any) -> None:
        if (run.state.step, ranks.rank()) == (self._settings.step, self._settings.rank):
            _, weight = next(run.engine.network.chunks[0].module.named_parameters())
            weight.detach().view(-1).view(torch.int32)[0] ^= 1
