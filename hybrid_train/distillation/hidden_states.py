"""Hidden states of a student drawn to those of its teacher, between the layers of both.

    loss = 1/P * sum over P pairs of layers of d(W_i h_i, t_j)
    d = mean over channels of (W h - t)^2, or 1 - cos(W h, t)

h_i is what layer i of the student hands on, t_j what layer j of the teacher does, W_i a matrix that
is trained with the student and serves nothing else: it lies in the student's checkpoints, and who
loads the student drops it. The stage that holds layer i computes the loss where h_i is made, so the
gradient joins that of the layers above on its way back, and no schedule knows of it.

Its weight is given, or such that it counts as much as the divergence: the ratio of the means of
both over the step before, of all processes and microbatches. The first step has none.

Source: Minitron, arXiv:2407.14679, section 3 (up-projected states; the weight, there alpha).

Dimensions: B batch, S sequence of this context rank, S/tp with sequence parallelism, H student's
channels, H' teacher's.
"""

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Linear, Module, ModuleDict, functional

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.precision.emulated import Stage
from hybrid_train.schema.objective import HiddenLoss
from hybrid_train.schema.objective import HiddenStates as Settings
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

PROJECTIONS = "hidden_projections"  # in the names of weights
_EXTRA = "teacher_layer"  # token_extras: what a layer of the teacher hands on, [B, S / tp or S, H']


class AddProjections:
    """The edit that gives a student its projections, each on the stage of its layer.

    They begin as a part of the identity: channels of a pruned student are some of its teacher's.
    """

    stage = Stage.permute

    def __init__(self, settings: Settings, teacher_size: int) -> None:
        """Take which layers need one, and the hidden size of the teacher."""
        self._layers = settings.layers
        self._size = teacher_size

    def apply(self, chunks: Sequence[Module]) -> None:
        """Add them to the chunks of this process."""
        for chunk in chunks:
            assert isinstance(chunk, Hybrid)
            made = ModuleDict()
            for number, _ in _layers_of(chunk, self._layers):
                config, device = chunk.config, next(chunk.parameters()).device
                size, dtype = config.hidden_size, config.params_dtype
                one = Linear(size, self._size, bias=False, dtype=dtype, device=device)
                torch.nn.init.eye_(one.weight)
                # Each tensor rank has a part of the tokens then: gradients are summed over them.
                vars(one.weight)["sequence_parallel"] = config.sequence_parallel
                made[str(number)] = one
            if made:
                setattr(chunk, PROJECTIONS, made)


def _layers_of(chunk: Hybrid, numbers: Container[int]) -> Iterator[tuple[int, Module]]:
    """Yield those layers of a chunk, with their numbers in the whole model, from 1."""
    for layer in chunk.decoder.layers:
        if int(layer.layer_number) in numbers:
            yield int(layer.layer_number), layer


class TeacherStates:
    """Keeps what layers of a teacher hand on while it runs ahead; see `take`."""

    def __init__(self, teacher: Network, settings: Settings) -> None:
        """Listen to the layers of this stage."""
        self._kept: dict[int, list[Tensor]] = {}
        for chunk in teacher.chunks:
            for number, layer in _layers_of(chunk, set(settings.pairs.values())):
                self._kept[number] = []
                layer.register_forward_hook(self._keep(number))

    @property
    def layers(self) -> set[int]:
        """Those that this stage holds."""
        return set(self._kept)

    def _keep(self, number: int) -> Any:
        def hook(_: Module, __: Any, output: Any) -> None:
            self._kept[number].append(_states(output).detach().transpose(0, 1))

        return hook

    def take(self, microbatches: int) -> list[dict[str, Tensor]]:
        """Return the token_extras of each microbatch; every layer has seen them in order."""
        found: list[dict[str, Tensor]] = [{} for _ in range(microbatches)]
        for number, states in self._kept.items():
            assert len(states) == microbatches, f"layer {number} ran {len(states)} times"
            for one, extras in zip(states, found, strict=True):
                extras[f"{_EXTRA}.{number}"] = one
            states.clear()
        return found


def _states(output: Any) -> Tensor:
    """Return the hidden states of what a layer returns: alone, or with its context."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class _Attach(torch.autograd.Function):
    """Hands states on, and lets a loss that was made of them join on the way back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


class HiddenStates:
    """The loss on the layers of a student, added where these are computed.

    Attributes:
        weight: of the loss in this step.
    """

    def __init__(self, settings: Settings, student: Network, teacher: TeacherStates) -> None:
        """Listen to the layers of this stage.

        Raises:
            UserError: on this process, if a layer's pair is held by another pipeline stage.
        """
        self._settings = settings
        self._groups = student.groups
        self.weight = settings.weight or 0.0
        self._batch: Batch | None = None
        self._splits = False  # tokens over the tensor ranks
        self._sum = torch.zeros((), device=student.device)
        for chunk in student.chunks:
            bare = next(one for one in chunk.modules() if isinstance(one, Hybrid))
            self._splits = bool(bare.config.sequence_parallel)
            for number, layer in _layers_of(bare, settings.layers):
                theirs = settings.pairs[number]
                if theirs not in teacher.layers:
                    raise UserError(
                        f"objective.hidden.layers: layer {number} of the student and layer "
                        f"{theirs} of the teacher are on different pipeline stages; choose layers "
                        "at the same share of the depth, or parallel.pipeline=1"
                    )
                projection = getattr(bare, PROJECTIONS)[str(number)]
                layer.register_forward_hook(self._add(projection, f"{_EXTRA}.{theirs}"))

    @contextlib.contextmanager
    def seeing(self, batch: Batch) -> Iterator[None]:
        """Say which microbatch the layers see; outside of this they see none of a teacher's."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def _add(self, projection: Module, extra: str) -> Any:
        def hook(_: Module, __: Any, output: Any) -> Any:
            batch = self._batch
            if batch is None:
                return None
            states = _states(output)
            loss = self._loss(projection(states), batch.token_extras[extra].transpose(0, 1), batch)
            self._sum += loss.detach()
            if not torch.is_grad_enabled():
                return None
            states = _Attach.apply(states, loss * self.weight)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def _loss(self, mine: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """Sum up a pair over the tokens of this process; states [S, B, H']."""
        weights = batch.loss_weights.t()
        tensor = self._groups.tp
        if self._splits:
            weights = weights.chunk(tensor.size())[tensor.rank()]
        mine, theirs = mine.float(), theirs.float()
        if self._settings.kind is HiddenLoss.cosine:
            apart = 1 - functional.cosine_similarity(mine, theirs, dim=-1)
        else:
            apart = (mine - theirs).square().mean(dim=-1)
        return (apart * weights).sum() / len(self._settings.layers)

    def take(self) -> Tensor:
        """Return the sum over the tokens that this process speaks for, and begin anew."""
        found, self._sum = self._sum, torch.zeros_like(self._sum)
        repeated = self._groups.tp.rank() > 0 and not self._splits
        return torch.zeros_like(found) if repeated else found

    def balance(self, divergence: float, hidden: float) -> None:
        """Weigh the next step so that both terms count alike, unless the weight is given."""
        if self._settings.weight is None:
            self.weight = divergence / hidden if hidden > 0 else 0.0
