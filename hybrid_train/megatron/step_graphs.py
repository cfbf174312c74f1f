"""Whole steps in one CUDA graph: forward and backward passes, and the reduction of gradients.

Core (0.19.2, full_cuda_graph.py) runs its schedule some times as it is, captures it and replays it
from then on. A replay runs kernels alone, on the memory that they had at the capture: what differs
between steps has to come through the microbatches, which core copies there. The optimizer stays
outside, and so does what the host reads of a step. It has never run: no GPU was at hand.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hybrid_train.megatron.data_parallel import Chunks
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.schema.problems import UserError

_STAGE = "training"  # core's word for the graph of steps; that of validation is not made


def captures_steps(config: TransformerConfig) -> bool:
    """Tell whether the steps of a model are to be captured."""
    return bool(config.cuda_graph_impl == "full_iteration")


class StepGraph:
    """The graph of the steps of a network; core has one for the process.

    Passes of a validation, or those that look for a module with bad values, are not in it: they
    have other numbers of microbatches, and hooks that a replay would not run.
    """

    def __init__(self, warmup_steps: int) -> None:
        """Forget the graph of an earlier network.

        Args:
            warmup_steps: steps that run as they are before one is captured.
        """
        self._form: list[dict[str, str]] | None = None
        self._schedule = FullCudaGraphWrapper(
            get_forward_backward_func(), cuda_graph_warmup_steps=warmup_steps
        )
        self._schedule.reset_cuda_graph(_STAGE)
        StaticBufferLoader.static_buffers[_STAGE].clear()  # which the reset leaves

    def run(
        self,
        chunks: Chunks,
        forward_step: Callable[..., Any],
        batches: list[dict[str, Any]],
        *,
        shape: tuple[int, int],
    ) -> list[dict[str, Tensor]]:
        """Run all microbatches of a step as `run_schedule` does, with gradients.

        Args:
            chunks: the model chunks of this process.
            forward_step: as of `run_schedule`. A replay repeats what that of the capture did, so it
                must take from the iterator all that changes.
            batches: the microbatches: tensors by name, None, or dicts of these.
            shape: sequences and tokens per sequence of a microbatch, [B, S].

        Returns:
            What the loss function reported for each microbatch, in memory of its own.

        Raises:
            UserError: if the microbatches have another number, other fields or shapes than before.
        """
        self._require_same_form([dict(_forms(one)) for one in batches])
        reports = run_schedule(
            *(chunks, forward_step, batches),
            shape=shape,
            forward_only=False,
            schedule=self._schedule,
        )
        # The next replay writes over them.
        return [{name: value.clone() for name, value in one.items()} for one in reports]

    def _require_same_form(self, form: list[dict[str, str]]) -> None:
        """Refuse what a replay would not read: core copies it, or not, without a word."""
        if self._form is not None and form != self._form:
            raise UserError(
                "gpu.cuda_graphs=step replays steps of one form, and the microbatches of this step "
                f"have another: {_difference(self._form, form)}; give all rows the same fields and "
                "shapes, or set gpu.cuda_graphs=none"
            )
        self._form = form


def _forms(fields: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return what has to stay of each field: its name, type and shape."""
    found = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += _forms(value, f"{above}{name} ")
        elif value is not None:
            found.append((above + name, f"{value.dtype} {list(value.shape)}"))
    return found


def _difference(before: list[dict[str, str]], now: list[dict[str, str]]) -> str:
    if len(before) != len(now):
        return f"{len(now)} microbatches, and {len(before)} before"
    was, found = next((a, b) for a, b in zip(before, now, strict=True) if a != b)
    name = next(name for name in (*was, *found) if was.get(name) != found.get(name))
    return f"{name} is {found.get(name, 'not there')}, and was {was.get(name, 'not there')}"
