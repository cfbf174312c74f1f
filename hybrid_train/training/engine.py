"""One optimizer step: microbatches through Megatron's schedule, reduction, update, report."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.model.aux_losses import AUX_LOSSES
from hybrid_train.model.quantized import QuantizedProducts
from hybrid_train.optim.megatron import set_learning_rate
from hybrid_train.optim.schedules import learning_rate
from hybrid_train.runtime import progress
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.schedule import Schedule
from hybrid_train.training import megatron
from hybrid_train.training.bad_steps import BadSteps, NoLabelsError, SpikeError
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
    rate_offset: int  # tokens of the run that its schedule does not count; it starts after them
    rate_tokens: int  # tokens that it counts in all
    device: torch.device
    microbatch: int
    sequences_per_step: int  # unless a step is told otherwise
    sequence_length: int
    expert_layers: list[tuple[bool, int]]  # (in MTP, layer from 1) of every E layer of the model
    num_experts: list[int]  # of each of these layers
    num_routers: int  # of the whole model; MTP depths with blocks of their own have each their own
    quantized: QuantizedProducts | None  # None: none can be emulated
    sources: tuple[str, ...] = ()  # names; losses are told apart where there are several
    steps_done: int = 0

    def step(
        self,
        batches: Iterator[Batch],
        *,
        tokens_seen: int,
        sequences: int | None = None,
        bad_steps: BadSteps | None = None,
    ) -> StepReport:
        """Train on one global batch.

        Args:
            batches: where this rank takes its microbatches from.
            tokens_seen: by all ranks before this step; the schedule looks at it.
            sequences: of the global batch, in a run whose batch grows.
            bad_steps: which steps are skipped: without an update, parameters as before.

        Raises:
            NonFiniteError: if loss or gradient is not finite and such steps are not skipped;
                parameters are as before the step.
        """
        start = time.perf_counter()
        rate = learning_rate(self.schedule, tokens_seen - self.rate_offset, self.rate_tokens)
        set_learning_rate(self.optimizer, rate)
        sequences = sequences or self.sequences_per_step
        progress.enter(progress.DATA, self.steps_done + 1)
        microbatches = self._take(batches, sequences)
        progress.enter(progress.FORWARD_BACKWARD)
        megatron.zero_gradients(self.chunks)
        self.optimizer.zero_grad()
        AUX_LOSSES.take()  # of forward passes between steps, if there were any
        if self.quantized is not None:
            self.quantized.start_step(self.steps_done)
        try:
            found = self._run(microbatches, forward_only=False)
            progress.enter(progress.REDUCE)
            metrics = self._reduce(found, len(microbatches))
            self._require_sound(metrics, bad_steps)
            progress.enter(progress.OPTIMIZER)
            _, grad_norm, _ = self.optimizer.step()
            skipped, kind = "", ""
        except (NonFiniteError, SpikeError, NoLabelsError) as error:
            self.finalizer.restore_expert_biases()
            skipped, kind = self._located(error, microbatches, rate), error.kind
            grad_norm = math.nan
            metrics["skipped"] = 1.0
            if isinstance(error, NonFiniteError) and not (bad_steps and bad_steps.skips_nonfinite):
                end = tokens_seen + sequences * self.sequence_length
                where = f"tokens {tokens_seen} to {end}{_in_words(self._drawn(found))}"
                raise NonFiniteError(f"step {self.steps_done + 1}: {skipped}; {where}") from None
        if self.quantized is not None and not skipped:
            self.quantized.end_step()
        if bad_steps is not None:
            bad_steps.skipped() if skipped else bad_steps.took(metrics["loss"])
        self.steps_done += 1
        progress.enter(progress.BETWEEN)
        seconds = time.perf_counter() - start
        loss = metrics.pop("loss", math.nan)
        return StepReport(
            *(loss, float(grad_norm), rate, seconds, sequences, skipped, kind, self._drawn(found)),
            metrics,
        )

    def _drawn(self, found: "_Losses") -> dict[str, int]:
        """Return the valid tokens of each source, where they are told apart."""
        return dict(zip(self.sources, map(int, found.source_tokens.tolist()), strict=False))

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the mean of each loss term over batches, and of each source, without gradients."""
        progress.enter(progress.VALIDATION)
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            with self._said_once():
                microbatches = [self._own(batch) for batch in batches]
            found = self._run(self._filled_up(microbatches), forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        progress.enter(progress.BETWEEN)
        return self._means(found, _sum_over_processes(found.sums))

    def forward_only(self, microbatches: list[Batch]) -> None:
        """Run the forward pass alone; for whoever listens with module hooks."""
        with torch.no_grad():
            self._run(microbatches, forward_only=True)

    def _take(self, batches: Iterator[Batch], sequences: int) -> list[Batch]:
        count = sequences // (self.microbatch * self.groups.dp.size())
        with self._said_once():
            return [self._own(batch) for batch in islice(batches, count)]

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        """Of the processes that read the same rows, let the first say what is wrong with them."""
        try:
            yield
        except UserError as error:
            if not error.of_content:
                raise
            groups = self.groups
            error.everywhere = groups.dp.size() == 1
            error.repeated = any(one.rank() for one in (groups.tp, groups.pp, groups.cp))
            raise

    def _own(self, batch: Batch) -> Batch:
        """Return what this process sees of a microbatch of its data-parallel rank."""
        return batch.part_of(self.groups.cp.rank(), self.groups.cp.size()).to(self.device)

    def _filled_up(self, microbatches: list[Batch]) -> list[Batch]:
        """Add microbatches without labels until an interleaved schedule takes them.

        It takes multiples of the pipeline ranks only (core 0.19.2, schedules.py 1145).
        """
        if len(self.chunks) == 1 or not microbatches:
            return microbatches
        empty = replace(
            microbatches[0], loss_weights=torch.zeros_like(microbatches[0].loss_weights)
        )
        return microbatches + [empty] * (-len(microbatches) % self.groups.pp.size())

    def _run(self, microbatches: list[Batch], *, forward_only: bool) -> "_Losses":
        """Run the schedule; return this process's share of the sums, and all valid tokens."""
        terms = self.objective.count(microbatches)
        by_source = torch.zeros(self._told_apart, device=terms.device)
        for batch in microbatches:
            self._add(by_source, batch, batch.loss_weights.sum(dim=1))
        totals = torch.cat([terms, by_source])
        dist.all_reduce(totals, group=self.groups.dp_cp)

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
            progress.enter(progress.last().part)  # still there
            return self.objective.forward(model, next(iterator), totals[: len(terms)])

        reports = megatron.run_schedule(
            self.chunks,
            forward_step,
            microbatches,
            shape=(self.microbatch, self.sequence_length),
            forward_only=forward_only,
        )
        sums = torch.zeros_like(totals)
        if reports and self.groups.tp.rank() == 0:  # tensor ranks hold the same losses
            sums[: len(terms)] += torch.stack([report["sums"] for report in reports]).sum(dim=0)
            for batch, report in zip(microbatches, reports, strict=True):
                self._add(sums[len(terms) :], batch, report["rows"])
        return _Losses(sums, totals, len(terms))

    @property
    def _told_apart(self) -> int:
        return len(self.sources) if len(self.sources) > 1 else 0

    def _add(self, by_source: Tensor, batch: Batch, rows: Tensor) -> None:
        """Add a figure of each row of a microbatch, [B], to that of its source."""
        if self._told_apart and batch.source is not None:
            by_source.index_add_(0, batch.source, rows)

    def _means(self, found: "_Losses", sums: Tensor) -> dict[str, float]:
        """Divide sums over all processes by tokens; a term or source without any has no loss."""
        names = [*self.objective.names, *(f"loss/{name}" for name in self.sources)]
        pairs = zip(names, sums.tolist(), found.totals.tolist(), strict=False)
        return {name: value / total for name, value, total in pairs if total}

    def _reduce(self, found: "_Losses", num_microbatches: int) -> dict[str, float]:
        """Bring losses, balance loss and expert loads of all processes together, in one message."""
        terms, layers = len(found.sums), len(self.expert_layers)
        loads = torch.zeros(layers, max(self.num_experts, default=0), device=self.device)
        for place, counts in self.finalizer.expert_counts.items():
            loads[self.expert_layers.index(place), : len(counts)] = counts
        aux = AUX_LOSSES.take()
        aux = torch.zeros(1, device=self.device) if aux is None else aux.reshape(1)
        message = _sum_over_processes(torch.cat([found.sums, aux, loads.flatten()]))
        metrics = self._means(found, message[:terms])
        if layers:
            ranks = self.groups.dp.size()  # each data-parallel rank has the mean of its own tokens
            applications = self.num_routers * num_microbatches * ranks
            metrics["moe_aux_loss"] = message[terms].item() / applications
            loads = message[terms + 1 :].view(loads.shape)
            experts = torch.tensor(self.num_experts, device=self.device)
            ratios = (loads.amax(dim=1) / (loads.sum(dim=1) / experts)).tolist()
            for (in_mtp, layer), ratio in zip(self.expert_layers, ratios, strict=True):
                metrics[f"expert_load_{'mtp_' if in_mtp else ''}{layer}"] = ratio
        return metrics

    def _require_sound(self, metrics: dict[str, float], bad_steps: BadSteps | None) -> None:
        """Refuse a step without labels, with a loss that is not finite, or with a spike of it."""
        main, *depths = self.objective.names
        if main not in metrics:  # an MTP depth may well have none
            raise NoLabelsError("no token of the step has a label that counts")
        for name in (main, *depths):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise NonFiniteError(f"{name} is {metrics[name]}")
        if bad_steps is not None:
            bad_steps.require_usual(metrics[main])

    def _located(self, error: UserError, microbatches: list[Batch], rate: float) -> str:
        """Say what was wrong; of what is not finite also on which rank and in which module."""
        if isinstance(error, SpikeError):
            return f"{error}; learning rate {rate:.3g}"
        if not isinstance(error, NonFiniteError):
            return str(error)
        culprit = first_bad_module(
            self.chunks, lambda: self.forward_only(microbatches), stage=self.groups.pp.rank()
        )
        return f"{error}; {culprit}; learning rate {rate:.3g}"


@dataclass(frozen=True)
class _Losses:
    """Sums of a step: of the terms of the objective, then of each source that is told apart.

    Attributes:
        sums: losses of this process, [terms + sources].
        totals: valid tokens of all processes, [terms + sources].
        terms: how many terms the objective has.
    """

    sums: Tensor
    totals: Tensor
    terms: int

    @property
    def source_tokens(self) -> Tensor:
        """Return the valid tokens of each source, [sources]."""
        return self.totals[self.terms :]


def _in_words(drawn: dict[str, int]) -> str:
    """Say which sources a step read: ", of web 300, code 20"."""
    named = [f"{name} {count}" for name, count in drawn.items() if count]
    return f", of {', '.join(named)}" if named else ""


def _sum_over_processes(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
