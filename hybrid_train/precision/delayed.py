"""Delayed scaling: the scale of a tensor comes from the largest values of earlier steps.

Source: Micikevicius et al., arXiv:2209.05433, section 4; Transformer Engine's DelayedScaling with
a margin of 0.
"""

import torch
from torch import Tensor

from hybrid_train.precision.formats import GRIDS
from hybrid_train.precision.schemes import Element
from hybrid_train.schema.precision import AmaxChoice


class AmaxHistory:
    """The largest magnitudes of one operand in the last steps; it is not saved.

    The first step, of a run or after a resume, takes the present largest value.
    """

    def __init__(self, length: int, choice: AmaxChoice) -> None:
        self._length = length
        self._choice = choice
        self._earlier: list[Tensor] = []  # newest first
        self.seen = torch.zeros(())  # largest of this step

    def scale(self, tensor: Tensor, element: Element) -> Tensor:
        """Return the factor back of a tensor, and remember its largest magnitude."""
        amax = tensor.abs().amax().float() if tensor.numel() else torch.zeros(())
        self.seen = torch.maximum(self.seen.to(amax.device), amax)
        if self._earlier:
            newest_only = self._choice is AmaxChoice.most_recent
            amax = self._earlier[0] if newest_only else torch.stack(self._earlier).amax()
        # torch.div rounds once, number / tensor twice.
        scale = torch.div(GRIDS[element].largest, amax).clamp_max(torch.finfo(torch.float32).max)
        return torch.where(amax == 0, 1.0, scale).reciprocal()

    def forget(self) -> None:
        """Begin a step: what was seen since the last one, in a validation, does not count."""
        self.seen = torch.zeros_like(self.seen)

    def roll(self, amax: Tensor) -> None:
        """End a step in which this was the largest magnitude on all ranks that share the tensor."""
        self._earlier = [amax, *self._earlier][: self._length]
        self.forget()
