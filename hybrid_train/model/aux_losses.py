"""Balance losses of the expert layers, recorded while the forward pass runs."""

from typing import Any

import torch
from torch import Tensor


class AuxLosses:
    """Sums of the unweighted balance loss over microbatches and layers of this process.

    Takes the place of Megatron's metrics tracker; `record` has the signature its router calls.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def record(self, name: str, value: Tensor, *_: Any, **__: Any) -> None:
        """Add the loss of one layer and microbatch; validation is not recorded."""
        if torch.is_grad_enabled():
            self._sums[name] = self._sums.get(name, 0) + value.detach()

    def take(self, name: str = "seq_load_balancing_loss") -> Tensor | None:
        """Return the sum since the last call, and forget it; None if nothing was recorded."""
        return self._sums.pop(name, None)


AUX_LOSSES = AuxLosses()
