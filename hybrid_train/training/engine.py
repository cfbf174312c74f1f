"""One step: the turns of the objective on one global batch, all of them or none, and a report."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.megatron.forward_backward import run_schedule
from hybrid_train.runtime import heartbeat
from hybrid_train.schema.problems import UserError
from hybrid_train.training.bad_steps import (
    BadSteps,
    NoLabelsError,
    NonFiniteError,
    SpikeError,
    first_bad_module,
)
from hybrid_train.training.network import Network
from hybrid_train.training.objective import Objective, Turn

_BAD_STEP_ERRORS = (NonFiniteError, SpikeError, NoLabelsError)


@dataclass
class StepReport:
    """Outcome of one step, the same on every rank."""

    loss: float  # first term of the objective, by what divides it; of next_token in nats
    grad_norm: float  # before clipping
    lr: float
    seconds: float
    sequences: int  # of the global batch
    skipped: str = ""  # why the update was not made; empty: it was
    skipped_kind: str = ""  # the same in a word: nonfinite, spike, no labels
    source_tokens: dict[str, int] = field(default_factory=dict)  # labels, where there are several
    metrics: dict[str, float] = field(default_factory=dict)  # by name of tracking/metrics.py


@dataclass(frozen=True)
class Losses:
    """Sums of the terms of the objective, then of each source that is told apart.

    Attributes:
        names: of the metrics, [terms + sources].
        sums: of this process, [terms + sources].
        totals: weights in all processes that divide them, [terms + sources].
        drawn: labels of each source in all processes.
    """

    names: tuple[str, ...]
    sums: Tensor
    totals: Tensor
    drawn: dict[str, int]

    def plus(self, other: "Losses") -> "Losses":
        """Return those of both, of other microbatches; what was drawn is not added."""
        return replace(self, sums=self.sums + other.sums, totals=self.totals + other.totals)

    def means(self, sums: Tensor) -> dict[str, float]:
        """Divide sums over all processes; a term or source without any weight has no loss."""
        pairs = zip(self.names, sums.tolist(), self.totals.tolist(), strict=True)
        return {name: value / total for name, value, total in pairs if total}


def run_objective(
    network: Network,
    objective: Objective,
    microbatches: list[Batch],
    *,
    shape: tuple[int, int],
    sources: Sequence[str] = (),
    forward_only: bool,
) -> Losses:
    """Run the objective over a network; every process calls this.

    Args:
        network: what is run, and has the gradients then.
        objective: its terms.
        microbatches: this process's part of them.
        shape: sequences and tokens per sequence of a microbatch, [B, S].
        sources: names; losses of the first term are told apart where there are several.
        forward_only: no gradients.
    """
    sources = sources if len(sources) > 1 else ()
    terms = objective.count(microbatches)
    weights, labels = _by_source(microbatches, len(sources), terms)
    counts = torch.cat([terms, weights, labels])
    dist.all_reduce(counts, group=network.groups.dp_cp)
    told = len(terms) + len(sources)
    if not forward_only:
        network.normalise(counts[0], counts[-1])

    def forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> Any:
        heartbeat.enter(heartbeat.last().part)  # still there
        one = next(iterator)  # with all that a captured step reads, and nothing beside it
        return objective.forward(model, Batch(**one["batch"]), one["totals"])

    given = [{"batch": one.by_name(), "totals": counts[: len(terms)]} for one in microbatches]
    if network.step_graph is None or forward_only:
        reports = run_schedule(
            network.chunks, forward_step, given, shape=shape, forward_only=forward_only
        )
    else:
        reports = network.step_graph.run(network.chunks, forward_step, given, shape=shape)
    sums = torch.zeros_like(counts[:told])
    if reports and network.groups.tp.rank() == 0:  # tensor ranks hold the same losses
        sums[: len(terms)] += torch.stack([report["sums"] for report in reports]).sum(dim=0)
        for batch, report in zip(microbatches, reports, strict=True):
            _add_by_source(sums[len(terms) :], batch, report["rows"])
    recorded = objective.recorded()
    if recorded is not None:
        sums[: len(terms)] += recorded
    names = (*objective.names, *(f"loss/{name}" for name in sources))
    drawn = dict(zip(sources, map(int, counts[told:-1].tolist()), strict=True))
    return Losses(names, sums, counts[:told], drawn)


def _by_source(microbatches: Sequence[Batch], sources: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the weights of each source, [sources], and count the labels that have one.

    Returns:
        Weights, and labels of each source and of all, [sources + 1].
    """
    weights, labels = like.new_zeros(sources), like.new_zeros(sources + 1)
    for batch in microbatches:
        weighed = (batch.loss_weights != 0).sum(dim=1).to(like.dtype)
        _add_by_source(weights, batch, batch.loss_weights.sum(dim=1))
        _add_by_source(labels[:-1], batch, weighed)
        labels[-1] += weighed.sum()
    return weights, labels


def _add_by_source(by_source: Tensor, batch: Batch, rows: Tensor) -> None:
    """Add a figure of each row of a microbatch, [B], to that of its source."""
    if len(by_source) and batch.source is not None:
        by_source.index_add_(0, batch.source, rows)


@dataclass
class Engine:
    """What the steps of a phase share; the same calls are made by every process of the run."""

    networks: Mapping[str, Network]
    objective: Objective
    microbatch: int
    sequences_per_step: int  # unless a step is told otherwise
    sequence_length: int
    sources: tuple[str, ...] = ()  # names; losses are told apart where there are several
    steps_done: int = 0

    @property
    def network(self) -> Network:
        """The first network; the only one unless the objective trains several."""
        return next(iter(self.networks.values()))

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
        sequences = sequences or self.sequences_per_step
        heartbeat.enter(heartbeat.DATA, self.steps_done + 1)
        microbatches = self._take(batches, sequences)
        heartbeat.enter(heartbeat.FORWARD_BACKWARD)
        taken = self._take_turns(self.objective.prepare(microbatches), tokens_seen, bad_steps)
        skips = bad_steps is not None and bad_steps.skips_nonfinite
        if taken.kind == NonFiniteError.kind and not skips:
            end = tokens_seen + sequences * self.sequence_length
            where = f"tokens {tokens_seen} to {end}{_sources_in_words(taken.drawn)}"
            raise NonFiniteError(f"step {self.steps_done + 1}: {taken.skipped}; {where}")
        if not taken.skipped:
            self.objective.took(taken.metrics)
        loss = taken.metrics.pop(self.objective.names[0], math.nan)
        if bad_steps is not None:
            bad_steps.skipped() if taken.skipped else bad_steps.took(loss)
        self.steps_done += 1
        heartbeat.enter(heartbeat.BETWEEN)
        seconds = time.perf_counter() - start
        return StepReport(
            *(loss, taken.norm, taken.rate, seconds, sequences, taken.skipped, taken.kind),
            taken.drawn,
            taken.metrics,
        )

    def _take_turns(
        self, microbatches: list[Batch], tokens_seen: int, bad_steps: BadSteps | None
    ) -> "_Taken":
        """Take all turns of a step; where one of them is bad, take back those before it."""
        taken, put_back, turns = _Taken(), [], self.objective.turns
        for number, turn in enumerate(turns, start=1):
            network = self.networks[turn.network]
            if number < len(turns):  # a bad last turn has changed nothing yet
                put_back.append(network.snapshot())
            rate = network.start_turn(self.steps_done, tokens_seen)
            self._note(taken, turn, "lr", rate)
            try:
                with self._alone(network):
                    self._take_turn(turn, microbatches, taken, bad_steps)
            except _BAD_STEP_ERRORS as error:
                assert network.finalizer is not None
                network.finalizer.restore_expert_biases()
                taken.skipped = self._located(error, turn, microbatches, rate)
                taken.kind = error.kind
                taken.metrics["skipped"] = 1.0
                self._note(taken, turn, "grad_norm", math.nan)
                for restore in reversed(put_back):
                    restore()
                return taken
        for name in dict.fromkeys(turn.network for turn in turns):
            quantized = self.networks[name].quantized
            if quantized is not None:
                quantized.end_step()
        return taken

    def _take_turn(
        self, turn: Turn, microbatches: list[Batch], taken: "_Taken", bad_steps: BadSteps | None
    ) -> None:
        network = self.networks[turn.network]
        found = self._run(turn, microbatches, forward_only=False)
        taken.drawn.update(found.drawn)
        heartbeat.enter(heartbeat.REDUCE)
        metrics = self._reduce(network, found, len(microbatches))
        taken.metrics.update(metrics)
        self._require_sound(turn, metrics, bad_steps)
        heartbeat.enter(heartbeat.OPTIMIZER)
        self._note(taken, turn, "grad_norm", network.update())

    @contextmanager
    def _alone(self, network: Network) -> Iterator[None]:
        """Freeze the other networks."""
        with contextlib.ExitStack() as stack:
            for other in self.networks.values():
                if other is not network:
                    stack.enter_context(other.out_of_turn())
            yield

    def _note(self, taken: "_Taken", turn: Turn, name: str, value: float) -> None:
        """Note rate or norm of a turn: those of the first network are the step's."""
        if turn.network == self.network.name:
            if name == "lr":
                taken.rate = value
            else:
                taken.norm = value
        else:
            taken.metrics[f"{name}/{turn.network}"] = value

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the mean of each loss term over batches, and of each source, without gradients."""
        heartbeat.enter(heartbeat.VALIDATION)
        turns, left = list(dict.fromkeys(self.objective.turns)), iter(batches)
        losses: dict[Turn, Losses] = {}
        with contextlib.ExitStack() as stack:
            for network in self.networks.values():
                stack.enter_context(network.evaluating())
            while microbatches := self._validated_at_once(left):
                microbatches = self.objective.prepare(self._filled_up(microbatches))
                for turn in turns:
                    one = self._run(turn, microbatches, forward_only=True)
                    losses[turn] = losses[turn].plus(one) if turn in losses else one
        means = (one.means(_sum_over_processes(one.sums)) for one in losses.values())
        found = {name: value for of_turn in means for name, value in of_turn.items()}
        heartbeat.enter(heartbeat.BETWEEN)
        return found

    def _validated_at_once(self, left: Iterator[Batch]) -> list[Batch]:
        """Take microbatches of a validation: as many as a step has, where each has a slot."""
        if type(self.objective).prepare is not Objective.prepare:
            of_step = self.sequences_per_step // (self.microbatch * self.network.groups.dp.size())
            left = islice(left, max(of_step, 1))
        with self._said_once():
            return [self.network.own(batch) for batch in left]

    def forward_only(self, turn: Turn, microbatches: list[Batch]) -> None:
        """Run the forward pass of a turn alone; for whoever listens with module hooks."""
        with torch.no_grad():
            self._run(turn, microbatches, forward_only=True)

    def _take(self, batches: Iterator[Batch], sequences: int) -> list[Batch]:
        count = sequences // (self.microbatch * self.network.groups.dp.size())
        with self._said_once():
            return [self.network.own(batch) for batch in islice(batches, count)]

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        """Of the processes that read the same rows, let the first say what is wrong with them."""
        try:
            yield
        except UserError as error:
            if not error.of_content:
                raise
            groups = self.network.groups
            error.on_all_ranks = groups.dp.size() == 1
            error.repeated = any(one.rank() for one in (groups.tp, groups.pp, groups.cp))
            raise

    def _filled_up(self, microbatches: list[Batch]) -> list[Batch]:
        """Add microbatches without labels until the schedule takes them."""
        missing = -len(microbatches) % self.network.passes_multiple
        return microbatches + [batch.without_labels() for batch in microbatches[:1]] * missing

    def _run(self, turn: Turn, microbatches: list[Batch], *, forward_only: bool) -> Losses:
        """Run a turn; losses of sources are told apart in the one that is reported as the loss."""
        return run_objective(
            self.networks[turn.network],
            turn.objective,
            microbatches,
            shape=(self.microbatch, self.sequence_length),
            sources=self.sources if self._is_main(turn) else (),
            forward_only=forward_only,
        )

    def _is_main(self, turn: Turn) -> bool:
        return turn.objective.names[0] == self.objective.names[0]

    def _reduce(self, network: Network, found: Losses, num_microbatches: int) -> dict[str, float]:
        """Bring losses, balance loss and expert loads of all processes together, in one message."""
        assert network.finalizer is not None
        counts, balance = network.finalizer.expert_counts, network.balance_losses.take()
        routed = network.routing.message(counts, balance, network.device)
        message = _sum_over_processes(torch.cat([found.sums, routed]))
        sums, routed = message.split([len(found.sums), len(routed)])
        # Each data-parallel rank has the mean balance loss of its own tokens.
        passes = num_microbatches * network.groups.dp.size()
        of_routers = network.routing.metrics(routed, passes)
        if network is not self.network:
            of_routers = {f"{name}/{network.name}": value for name, value in of_routers.items()}
        return found.means(sums) | of_routers

    def _require_sound(
        self, turn: Turn, metrics: Mapping[str, float], bad_steps: BadSteps | None
    ) -> None:
        """Refuse a turn without labels, with a loss that is not finite, or with a spike of it."""
        main, *others = turn.objective.names
        if main not in metrics:  # an MTP depth may well have none
            raise NoLabelsError("no token of the step has a label that counts")
        for name in (main, *others):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise NonFiniteError(f"{name} is {metrics[name]}")
        if bad_steps is not None and self._is_main(turn):
            bad_steps.require_usual(metrics[main])

    def _located(self, error: UserError, turn: Turn, microbatches: list[Batch], rate: float) -> str:
        """Say what was wrong; of what is not finite also on which rank and in which module."""
        if isinstance(error, SpikeError):
            return f"{error}; learning rate {rate:.3g}"
        if not isinstance(error, NonFiniteError):
            return str(error)
        network = self.networks[turn.network]
        culprit = first_bad_module(
            network.chunks,
            lambda: self.forward_only(turn, microbatches),
            stage=network.groups.pp.rank(),
        )
        return f"{error}; {culprit}; learning rate {rate:.3g}"


@dataclass
class _Taken:
    """What came of the turns of a step."""

    rate: float = math.nan  # of the first network
    norm: float = math.nan
    skipped: str = ""  # why the step is taken back; empty: it is not
    kind: str = ""
    drawn: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def _sources_in_words(drawn: Mapping[str, int]) -> str:
    """Say which sources a step read: ", of web 300, code 20"."""
    named = [f"{name} {count}" for name, count in drawn.items() if count]
    return f", of {', '.join(named)}" if named else ""


def _sum_over_processes(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
