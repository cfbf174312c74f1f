"""Which steps are not taken and why, and where a loss or a gradient stopped being finite."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from hybrid_train.checkpoint.shards import bare
from hybrid_train.megatron.data_parallel import Chunks, non_finite_gradients
from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.schema.problems import UserError


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite. Both are sums over all processes."""

    on_all_ranks = True
    kind = "nonfinite"


class SpikeError(UserError):
    """A loss far above those before it; the same on all processes."""

    on_all_ranks = True
    kind = "spike"


class NoLabelsError(UserError):
    """A step in which no label counts, so that it has neither loss nor gradient."""

    on_all_ranks = True
    kind = "no labels"


class BadSteps:
    """Judges the loss of a step before its update; all processes judge alike.

    A spike is more than `spike_sigmas` standard deviations above the mean of the last
    `spike_window` losses that were taken (as SkipStepOptimizer of OLMo-core does).
    """

    def __init__(self, settings: Recovery, lines: Iterable[Mapping[str, float]] = ()) -> None:
        """Take the settings.

        Args:
            settings: what counts as bad.
            lines: metrics of the steps before, in order; of a run that goes on.
        """
        self.skips_nonfinite = settings.skip_nonfinite
        self._sigmas = settings.spike_sigmas
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self.in_a_row = 0  # steps without update up to now
        for line in lines:
            if line.get("skipped"):
                self.in_a_row += 1
            else:
                self.took(line["loss"])

    def require_usual(self, loss: float) -> None:
        """Refuse a spike.

        Raises:
            SpikeError: with the loss and what was usual.
        """
        window = self._losses
        if not self._sigmas or len(window) < (window.maxlen or 0):
            return
        mean, deviation = statistics.fmean(window), statistics.stdev(window)
        if loss > mean + self._sigmas * deviation:
            raise SpikeError(
                f"loss {loss:.4f} is {(loss - mean) / max(deviation, 1e-12):.1f} standard "
                f"deviations above the {mean:.4f} of the last {len(window)} steps"
            )

    def forget(self) -> None:
        """Begin a new window: other data or another batch may have a loss of its own."""
        self._losses.clear()

    def took(self, loss: float) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0
        if math.isfinite(loss):
            self._losses.append(loss)

    def skipped(self) -> None:
        """Count a step that was not."""
        self.in_a_row += 1


def raise_bad_norm(norm: float) -> None:
    """Refuse a gradient norm that is not finite, before the optimizer touches anything."""
    raise NonFiniteError(f"the gradient norm is {norm}")


def first_bad_module(chunks: Chunks, replay: Callable[[], None], *, stage: int = 0) -> str:
    """Name rank and module where the numbers went bad; every process calls this.

    Args:
        chunks: the model chunks of this process; gradients still in their buffers.
        replay: repeats the forward pass of the step on all processes.
        stage: pipeline stage of this process.
    """
    in_gradients = non_finite_gradients(chunks)
    found = _found_in_forward(chunks, replay)
    # Bad gradients spread from the loss towards the input: the last module has them first.
    sighting = found and (stage, *found)
    mine = (sighting, in_gradients[-1] if in_gradients else None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    # What goes bad on one tensor rank is bad on the others a few modules later.
    seen = [(*one, rank) for rank, (one, _) in enumerate(everyone) if one is not None]
    if seen:
        *_, module, rank = min(seen, key=lambda one: (one[0], one[1], one[-1]))
        return f"first in the forward pass on rank {rank}, module {module}"
    for rank, (_, parameter) in reversed(list(enumerate(everyone))):
        if parameter is not None:
            return f"first in the backward pass on rank {rank}, parameter {parameter}"
    return "the forward pass, repeated, does not show it"


def _found_in_forward(chunks: Chunks, replay: Callable[[], None]) -> tuple[int, str] | None:
    """Return the first module with a bad output, and how many were called until then."""
    bad: list[tuple[int, str]] = []
    calls = itertools.count()

    def listen(name: str) -> Callable[..., None]:
        def after(module: torch.nn.Module, _: Any, output: Any) -> None:
            call = next(calls)
            tensors = output if isinstance(output, tuple) else (output,)
            if any(_is_bad(tensor) for tensor in tensors):
                own = module.named_parameters(recurse=False)
                ill = [f"its {part}" for part, parameter in own if _is_bad(parameter)]
                bad.append((call, f"{name} ({', '.join(ill)} not finite)" if ill else name))

        return after

    handles = [
        module.register_forward_hook(listen(name))
        for chunk in chunks
        for name, module in bare(chunk).named_modules()
        if name and not any(True for _ in module.children())
    ]
    replay()
    for handle in handles:
        handle.remove()
    return bad[0] if bad else None


def _is_bad(value: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
        return False
    return not bool(torch.isfinite(value).all())
