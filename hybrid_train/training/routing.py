"""What the routers of a network did in a step: balance loss and loads, in one message."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_train.tracking import metrics


@dataclass(frozen=True)
class ExpertLayer:
    """An expert layer of the whole model; MTP blocks of several depths share theirs."""

    in_mtp: bool
    layer: int  # from 1, of the main layers or of the MTP block
    experts: int


@dataclass(frozen=True)
class Routing:
    """The expert layers of a network.

    Attributes:
        layers: all of them, also those of other pipeline stages.
        routers: of the whole model; MTP depths with blocks of their own have each their own.
    """

    layers: tuple[ExpertLayer, ...]
    routers: int

    def message(
        self,
        counts: Mapping[tuple[bool, int], Tensor],
        balance: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Return what this process knows, to be summed over all: [1 + experts of all layers].

        Args:
            counts: (in MTP, layer) -> tokens of each expert, [experts], of layers held here.
            balance: sum of the balance losses.
            device: of the message.
        """
        places = [(one.in_mtp, one.layer) for one in self.layers]
        unknown = counts.keys() - set(places)
        assert not unknown, f"no such expert layers: {unknown}"
        first = torch.zeros(1, device=device) if balance is None else balance.reshape(1)
        loads = [
            counts[place].float() if place in counts else torch.zeros(one.experts, device=device)
            for place, one in zip(places, self.layers, strict=True)
        ]
        return torch.cat([first, *loads])

    def metrics(self, message: Tensor, passes: int) -> dict[str, float]:
        """Return the metrics of a step; none where there are no expert layers.

        Args:
            message: summed over all processes.
            passes: microbatches of all data-parallel ranks.
        """
        if not self.layers:
            return {}
        found = {"moe_aux_loss": message[0].item() / (self.routers * passes)}
        loads = message[1:].split([one.experts for one in self.layers])
        ratios = torch.stack([load.amax() / load.mean() for load in loads]).tolist()
        for one, ratio in zip(self.layers, ratios, strict=True):
            found[metrics.expert_load(one.layer, in_mtp=one.in_mtp)] = ratio
        return found
