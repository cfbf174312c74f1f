"""A model on this process, with all that belongs to it alone: optimizer, rate, loads of experts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_train.anatomy.selection import Selection
from hybrid_train.data.batch import Batch
from hybrid_train.megatron import data_parallel, forward_backward
from hybrid_train.megatron.data_parallel import ProcessGroups
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.megatron.optimizers import (
    MegatronOptimizer,
    set_learning_rate,
    torch_optimizers,
    working_parts,
)
from hybrid_train.megatron.router import BalanceLosses
from hybrid_train.megatron.step_graphs import StepGraph
from hybrid_train.model.quantized import QuantizedGemms
from hybrid_train.optim.schedules import learning_rate
from hybrid_train.schema.model import Moe
from hybrid_train.schema.objective import MAIN
from hybrid_train.schema.optimizer import Schedule
from hybrid_train.tracking import metrics


@dataclass(frozen=True)
class ExpertLayer:
    """An expert layer of the whole model; MTP blocks of several depths share theirs."""

    in_mtp: bool
    layer: int  # from 1, of the main layers or of the MTP block
    experts: int
    left: int  # of these, where some are masked; 0: the layer is skipped


@dataclass(frozen=True)
class Routing:
    """The expert layers of a network, and the message of what their routers did in a step.

    Attributes:
        layers: all of them, also those of other pipeline stages.
        routers: of the whole model; MTP depths with blocks of their own have each their own.
    """

    layers: tuple[ExpertLayer, ...]
    routers: int

    def masked(self, selection: Selection) -> "Routing":
        """Return what is left of the expert layers under a mask."""
        kept = [one for one in selection.layers if one.parent.letter == Moe.letter]
        left = {(one.parent.depth > 0, one.parent.number): one.child.sizes.experts for one in kept}
        layers = tuple(
            replace(one, left=left.get((one.in_mtp, one.layer), 0)) for one in self.layers
        )
        return Routing(layers, len(kept))

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
        if not self.routers:
            return {}
        found = {"moe_aux_loss": message[0].item() / (self.routers * passes)}
        loads = message[1:].split([one.experts for one in self.layers])
        left = [(one, load) for one, load in zip(self.layers, loads, strict=True) if one.left]
        ratios = torch.stack([load.amax() / (load.sum() / one.left) for one, load in left]).tolist()
        for (one, _), ratio in zip(left, ratios, strict=True):
            found[metrics.expert_load(one.layer, in_mtp=one.in_mtp)] = ratio
        return found


@dataclass(frozen=True)
class Rate:
    """The learning rate of a network over the tokens of the run."""

    schedule: Schedule
    tokens: int  # that it counts in all
    offset: int = 0  # tokens of the run that it does not count; it starts after them

    def at(self, tokens_seen: int) -> float:
        """Return the rate of a step that begins after so many tokens of the run."""
        return learning_rate(self.schedule, tokens_seen - self.offset, self.tokens)


@dataclass
class Network:
    """The part of a model that this process holds; without an optimizer it is a teacher.

    Attributes:
        chunks: model chunks of this process; wrapped for data parallelism where they are trained.
        groups: the processes that hold the others.
        device: of this process.
        routing: the expert layers.
        balance_losses: the record of its routers.
        quantized: its emulated GEMMs; None: none can be emulated.
        left: what of it is not masked; None: all.
        name: what a turn calls it by, and a checkpoint where it holds several.
        optimizer: None: it is not trained.
        rate: of the optimizer.
        finalizer: reduces the gradients.
        step_graph: runs the passes of its steps in one CUDA graph; None: each kernel is launched.
    """

    chunks: list[Any]
    groups: ProcessGroups
    device: torch.device
    routing: Routing
    balance_losses: BalanceLosses
    quantized: QuantizedGemms | None = None
    left: Selection | None = None
    name: str = MAIN
    optimizer: MegatronOptimizer | None = None
    rate: Rate | None = None
    finalizer: forward_backward.Finalizer | None = None
    step_graph: StepGraph | None = None

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows; ids from here on are padding of its vocabulary."""
        first = self.chunks[0].modules()
        return next(one.num_tokens for one in first if isinstance(one, Hybrid))

    @property
    def passes_multiple(self) -> int:
        """How many passes its schedule takes a multiple of.

        An interleaved one takes the pipeline ranks (core 0.19.2, schedules.py 1145).
        """
        return self.groups.pp.size() if len(self.chunks) > 1 else 1

    def own(self, batch: Batch) -> Batch:
        """Return what this process sees of a microbatch of its data-parallel rank."""
        context = self.groups.cp
        return batch.part_of(context.rank(), context.size()).to(self.device)

    def start_turn(self, step: int, tokens_seen: int) -> float:
        """Begin an update with nothing left of earlier passes; return its learning rate.

        Args:
            step: steps done before.
            tokens_seen: by all ranks before.
        """
        assert self.optimizer is not None, f"{self.name} is not trained"
        assert self.rate is not None, f"{self.name} has no learning rate"
        rate = self.rate.at(tokens_seen)
        set_learning_rate(self.optimizer, rate)
        data_parallel.zero_gradients(self.chunks)
        self.optimizer.zero_grad()
        forward_backward.forget_loads(self.chunks)
        self.balance_losses.take()
        if self.quantized is not None:
            self.quantized.start_step(step)
        return rate

    def normalise(self, denominator: Tensor, labels: Tensor) -> None:
        """Say what the gradient of the next pass is divided by, once for the whole step.

        Args:
            denominator: of the main term, summed over all processes, float.
            labels: how many labels have a weight, in all processes. They divide the balance loss,
                whatever they weigh; it is a sum over all tokens that routers count, so it counts
                the more, the fewer of these have a label.
        """
        assert self.finalizer is not None, f"{self.name} is not trained"
        self.finalizer.denominator = torch.where(denominator > 0, denominator, 1.0)
        scale = denominator / labels
        self.balance_losses.scale = torch.where(labels > 0, scale, torch.ones_like(scale))

    def update(self) -> float:
        """Take the step of the optimizer; return the norm of the gradient before clipping.

        Raises:
            NonFiniteError: if the norm is not finite; nothing has changed then.
        """
        assert self.optimizer is not None, f"{self.name} is not trained"
        _, norm, _ = self.optimizer.step()
        return float(norm)

    def train(self, mode: bool = True) -> None:
        """Let its layers know whether they are trained."""
        for chunk in self.chunks:
            chunk.train(mode)

    @contextlib.contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Let its layers know that they are not trained, for a while."""
        modes = [chunk.training for chunk in self.chunks]
        self.train(False)
        try:
            yield
        finally:
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run forward passes without gradients, and be as before afterwards.

        Routers record nothing without gradients, and the family has no dropout: a run that is
        evaluated in between trains on as one that is not.
        """
        with self.in_eval_mode(), torch.no_grad():
            yield

    def freeze(self) -> None:
        """Let gradients flow through it from now on, and none stay in it."""
        self.train(False)  # nor does a balance loss join the loss of another network
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    @contextlib.contextmanager
    def out_of_turn(self) -> Iterator[None]:
        """Be frozen while another network is trained."""
        trained = [one for chunk in self.chunks for one in chunk.parameters() if one.requires_grad]
        self.freeze()
        try:
            yield
        finally:
            self.train()
            for parameter in trained:
                parameter.requires_grad_(True)

    def snapshot(self) -> Callable[[], None]:
        """Copy all that an update changes; return what puts it back."""
        tensors = list(self._updated())
        copies = [tensor.detach().clone() for tensor in tensors]
        counts = [group.get("step") for group in self._groups()]
        known = [(optimizer, set(optimizer.state)) for optimizer in self._optimizers()]

        def put_back() -> None:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
            for group, count in zip(self._groups(), counts, strict=True):
                group.pop("step", None) if count is None else group.update(step=count)
            for optimizer, parameters in known:  # FusedAdam makes its state at the first update
                for parameter in set(optimizer.state) - parameters:
                    del optimizer.state[parameter]

        return put_back

    def _updated(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            yield from chunk.module.parameters()
            yield from chunk.module.buffers()  # `buffers` of the wrapper are those of gradients
        for group in self._groups():
            yield from group["params"]
        for optimizer in self._optimizers():
            for state in optimizer.state.values():
                yield from (one for one in state.values() if isinstance(one, Tensor))

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers():
            yield from optimizer.param_groups

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """Yield those of torch's kind that the optimizer is made of."""
        assert self.optimizer is not None, f"{self.name} is not trained"
        for part in working_parts(self.optimizer):
            yield from torch_optimizers(part)
