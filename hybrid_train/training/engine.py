"""One optimizer step: microbatches through Megatron's schedule, reduction, update, report."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hybrid_train.config.schema.schedule import Schedule
from hybrid_train.data.batch import Batch
from hybrid_train.model.aux_losses import AUX_LOSSES
from hybrid_train.optim.megatron import set_learning_rate
from hybrid_train.optim.schedules import learning_rate
from hybrid_train.training import megatron
from hybrid_train.training.nonfinite import NonFiniteError, first_bad_module
from hybrid_train.training.objective import Objective
from hybrid_train.training.report import StepReport


@dataclass
class Engine:
    """Everything one step needs; the same calls are made by every process of the run."""

    chunks: megatron.Chunks
    optimizer: MegatronOptimizer
    objective: Objective
    finalizer: megatron.Finalizer
    groups: ProcessGroupCollection
    schedule: Schedule
    device: torch.device
    token_budget: int
    microbatch: int
    sequences_per_step: int  # unless a step is told otherwise
    sequence_length: int
    expert_layers: list[tuple[bool, int]]  # (in MTP, layer from 1) of every E layer of the model
    num_experts: int
    num_routers: int  # of the whole model; MTP depths with blocks of their own have each their own
    steps_done: int = 0

    def step(
        self, batches: Iterator[Batch], *, tokens_seen: int, sequences: int | None = None
    ) -> StepReport:
        """Train on one global batch.

        Args:
            batches: where this rank takes its microbatches from.
            tokens_seen: by all ranks before this step; the schedule looks at it.
            sequences: of the global batch, in a run whose batch grows.

        Raises:
            NonFiniteError: if loss or gradient is not finite; parameters are as before the step.
        """
        start = time.perf_counter()
        rate = learning_rate(self.schedule, tokens_seen, self.token_budget)
        set_learning_rate(self.optimizer, rate)
        sequences = sequences or self.sequences_per_step
        microbatches = self._take(batches, sequences)
        megatron.zero_gradients(self.chunks)
        self.optimizer.zero_grad()
        AUX_LOSSES.take()  # of forward passes between steps, if there were any
        try:
            sums, totals = self._run(microbatches, forward_only=False)
            metrics = self._reduce(sums, totals, len(microbatches))
            self._require_finite(metrics)
            _, grad_norm, _ = self.optimizer.step()
        except NonFiniteError as error:
            self.finalizer.restore_expert_biases()
            raise self._located(error, microbatches) from None
        self.steps_done += 1
        seconds = time.perf_counter() - start
        loss = metrics.pop("loss")
        return StepReport(loss, float(grad_norm), rate, seconds, sequences, metrics)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the mean of each loss term over batches, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            microbatches = [self._own(batch) for batch in batches]
            sums, totals = self._run(self._filled_up(microbatches), forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        values = (_sum_over_processes(sums) / totals).tolist()
        return dict(zip(self.objective.names, values, strict=True))

    def forward_only(self, microbatches: list[Batch]) -> None:
        """Run the forward pass alone; for whoever listens with module hooks."""
        with torch.no_grad():
            self._run(microbatches, forward_only=True)

    def _take(self, batches: Iterator[Batch], sequences: int) -> list[Batch]:
        count = sequences // (self.microbatch * self.groups.dp.size())
        return [self._own(batch) for batch in islice(batches, count)]

    def _own(self, batch: Batch) -> Batch:
        """Return what this process sees of a microbatch of its data-parallel rank."""
        return batch.part_of(self.groups.cp.rank(), self.groups.cp.size()).to(self.device)

    def _filled_up(self, microbatches: list[Batch]) -> list[Batch]:
        """Add microbatches without labels until an interleaved schedule takes them.

        It takes multiples of the pipeline ranks only (core 0.19.2, schedules.py 1145).
        """
        if len(self.chunks) == 1 or not microbatches:
            return microbatches
        empty = replace(microbatches[0], loss_mask=torch.zeros_like(microbatches[0].loss_mask))
        return microbatches + [empty] * (-len(microbatches) % self.groups.pp.size())

    def _run(self, microbatches: list[Batch], *, forward_only: bool) -> tuple[Tensor, Tensor]:
        """Run the schedule; return this process's share of the loss sums, and all valid tokens."""
        totals = self.objective.count(microbatches)
        dist.all_reduce(totals, group=self.groups.dp_cp)

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
            return self.objective.forward(model, next(iterator), totals)

        reports = megatron.run_schedule(
            self.chunks,
            forward_step,
            microbatches,
            shape=(self.microbatch, self.sequence_length),
            forward_only=forward_only,
        )
        sums = torch.zeros_like(totals)
        if reports and self.groups.tp.rank() == 0:  # tensor ranks hold the same losses
            sums += torch.stack([report["sums"] for report in reports]).sum(dim=0)
        return sums, totals

    def _reduce(self, sums: Tensor, totals: Tensor, num_microbatches: int) -> dict[str, float]:
        """Bring losses, balance loss and expert loads of all processes together, in one message."""
        terms, layers = len(self.objective.names), len(self.expert_layers)
        loads = torch.zeros(layers, self.num_experts, device=self.device)
        for place, counts in self.finalizer.expert_counts.items():
            loads[self.expert_layers.index(place)] = counts
        aux = AUX_LOSSES.take()
        aux = torch.zeros(1, device=self.device) if aux is None else aux.reshape(1)
        message = _sum_over_processes(torch.cat([sums, aux, loads.flatten()]))
        values = (message[:terms] / totals).tolist()
        metrics = dict(zip(self.objective.names, values, strict=True))
        if layers:
            ranks = self.groups.dp.size()  # each data-parallel rank has the mean of its own tokens
            applications = self.num_routers * num_microbatches * ranks
            metrics["moe_aux_loss"] = message[terms].item() / applications
            loads = message[terms + 1 :].view(layers, self.num_experts)
            ratios = (loads.amax(dim=1) / loads.mean(dim=1)).tolist()
            for (in_mtp, layer), ratio in zip(self.expert_layers, ratios, strict=True):
                metrics[f"expert_load_{'mtp_' if in_mtp else ''}{layer}"] = ratio
        return metrics

    def _require_finite(self, metrics: dict[str, float]) -> None:
        for name in self.objective.names:
            if not -float("inf") < metrics[name] < float("inf"):
                raise NonFiniteError(f"{name} is {metrics[name]}")

    def _located(self, error: NonFiniteError, microbatches: list[Batch]) -> NonFiniteError:
        """Say at which step, on which rank and in which module it began."""
        stage = self.groups.pp.rank()
        culprit = first_bad_module(
            self.chunks, lambda: self.forward_only(microbatches), stage=stage
        )
        return NonFiniteError(
            f"step {self.steps_done + 1}: {error}; {culprit}. Nothing was updated; the last "
            "checkpoint is good. Go on from it in another folder with a lower learning rate or "
            "other data: run_dir=... checkpoint.load=... schedule.peak_lr=... train.seed=..."
        )


def _sum_over_processes(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
