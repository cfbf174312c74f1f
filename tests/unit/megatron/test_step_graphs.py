"""Steps that are replayed are those that are not, and what a replay would not read is refused.

No GPU was at hand: a stand-in for a CUDA graph notes the call that it is to capture and makes it
again for a replay. That shows what comes through the copied microbatches, and in which order core
is called; whether each kernel can be captured, the test marked `gpu` would show.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.data.batch import Batch
from hybrid_train.schema.gpu import CudaGraphs, Gpu
from hybrid_train.schema.problems import UserError
from hybrid_train.training.bad_steps import NonFiniteError
from tests.tiny import (
    BATCH,
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)

pytestmark = MEGATRON_WARNINGS
PATTERN = "M*-/*-"
WARMUP = 2  # steps before the capture
STEPS = 5


class Graph:
    """Stands for a CUDA graph. A capture runs nothing; results stay where the first replay put
    them, as in the memory of a graph.
    """

    capturing: "Graph | None" = None
    log: list[str]

    def capture(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        (iterator,) = arguments["data_iterator"]
        self._call, self._held = (schedule, arguments), list(iterator)
        self._results: list[dict[str, Tensor]] = []
        return self._results

    def replay(self) -> None:
        Graph.log.append("replay")
        schedule, arguments = self._call
        reports = schedule(**{**arguments, "data_iterator": [iter(self._held)]})
        if not self._results:
            self._results.extend(reports)
        for place, report in zip(self._results, reports, strict=True):
            for name, value in report.items():
                place[name].copy_(value)


@pytest.fixture
def graphs(groups: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Graph]]:
    """Let core capture stand-ins, and forget them behind the test."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper

    from hybrid_train.megatron import step_graphs

    Graph.log = []
    schedule = step_graphs.get_forward_backward_func()

    @contextlib.contextmanager
    def capture(graph: Graph, **_: Any) -> Iterator[None]:
        Graph.log.append("capture")
        Graph.capturing = graph
        yield
        Graph.capturing = None

    def noted(**arguments: Any) -> Any:
        if Graph.capturing is not None:
            return Graph.capturing.capture(schedule, arguments)
        Graph.log.append("passes")
        return schedule(**arguments)

    monkeypatch.setattr(step_graphs, "get_forward_backward_func", lambda: noted)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    yield Graph
    FullCudaGraphWrapper(noted).reset_cuda_graph()


def captured_engine(groups: Any) -> Any:
    """An engine as a GPU builds it; a CPU leaves the switch out."""
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    job = tiny_job(PATTERN, gpu=Gpu(cuda_graphs=CudaGraphs.step, cuda_graph_warmup_steps=WARMUP))
    built = build_model(job, groups, VOCAB, on_gpu=False)
    built.config.cuda_graph_impl = "full_iteration"
    return build_engine(job, built, groups, torch.device("cpu"))


def step_data(step: int) -> Iterator[Batch]:
    """Other tokens and another number of labels in each step."""
    mask = torch.ones(BATCH, LENGTH)
    mask[: step % BATCH, step:] = 0
    return microbatches(some_rows(seed=step), 2, mask)


def steps_of(engine: Any) -> list[tuple[float, float, dict[str, float]]]:
    """Losses and norms of some steps, between which a validation runs."""
    found = []
    for step in range(STEPS):
        report = engine.step(step_data(step), tokens_seen=step)
        metrics = engine.evaluate([batch_of(some_rows()), batch_of(some_rows(seed=9))][: 1 + step])
        found.append((report.loss, report.grad_norm, report.metrics | metrics))
    return found


def weights_of(engine: Any) -> list[Tensor]:
    return [one.detach().clone() for one in engine.network.chunks[0].parameters()]


def test_replayed_steps_are_those_of_a_run_without_graphs(groups: Any, graphs: type[Graph]) -> None:
    plain, captured = tiny_engine(tiny_job(PATTERN), groups), captured_engine(groups)
    assert plain.network.step_graph is None
    assert steps_of(captured) == steps_of(plain)
    assert all(map(torch.equal, weights_of(captured), weights_of(plain)))
    replays = ["replay"] * (STEPS - WARMUP)
    assert graphs.log == ["passes"] * WARMUP + ["capture", *replays]


def test_what_a_captured_step_reads_stays_where_it_is(groups: Any, graphs: type[Graph]) -> None:
    from megatron.core.full_cuda_graph import StaticBufferLoader

    engine, places = captured_engine(groups), []
    for step in range(STEPS):
        engine.step(step_data(step), tokens_seen=step)
        held = StaticBufferLoader.static_buffers["training"]
        tensors = [engine.network.finalizer.denominator]
        tensors += [tensor for one in held for tensor in (one["totals"], one["batch"]["tokens"])]
        places.append([tensor.data_ptr() for tensor in tensors])
        labels = next(step_data(step)).labels
        assert torch.equal(held[0]["batch"]["labels"], labels)
    assert len(places[0]) == 5
    assert all(one == places[0] for one in places)


def test_reports_are_not_written_over_by_the_next_replay(groups: Any, graphs: type[Graph]) -> None:
    from hybrid_train.megatron.step_graphs import StepGraph

    def report(batch: dict[str, Tensor]) -> Any:
        return lambda output: (output, torch.ones((), dtype=torch.int), {"sums": batch["x"] * 1})

    model: Any = torch.nn.Linear(1, 1)
    engine = captured_engine(groups)
    chunk = engine.network.chunks[0]
    engine.network.finalizer.denominator = torch.tensor(1.0)

    def forward_step(iterator: Iterator[dict[str, Tensor]], _: Any) -> Any:
        batch = next(iterator)
        return model(batch["x"]).sum(), report(batch)

    graph = StepGraph(warmup_steps=1)
    run = [
        graph.run([chunk], forward_step, [{"x": torch.full((1,), value)}], shape=(1, LENGTH))
        for value in (1.0, 2.0, 3.0, 4.0)
    ]
    assert [reports[0]["sums"].item() for reports in run] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ones: ones[:1], "1 microbatches, and 2 before"),
        (lambda ones: [one._map(lambda _, x: x[:1]) for one in ones], r"\[1, 16\], and was .*\[2"),
        (lambda ones: [with_extra(one) for one in ones], "row_extras id is .* and was not there"),
    ],
)
def test_a_step_of_another_form_is_refused(
    groups: Any, graphs: type[Graph], change: Callable[[list[Batch]], list[Batch]], words: str
) -> None:
    engine = captured_engine(groups)
    engine.step(step_data(0), tokens_seen=0)
    data = step_data(1)
    with pytest.raises(UserError, match=words):
        engine.step(iter(change([next(data), next(data)])), tokens_seen=1)


def with_extra(batch: Batch) -> Batch:
    return Batch(**batch.by_name() | {"row_extras": {"id": torch.zeros(2)}})


def test_a_bad_replay_is_refused_and_its_module_looked_for_outside_the_graph(
    groups: Any, graphs: type[Graph]
) -> None:
    engine = captured_engine(groups)
    for step in range(STEPS):
        engine.step(step_data(step), tokens_seen=step)
    before = weights_of(engine)
    with torch.no_grad():
        engine.network.chunks[0].module.decoder.final_norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"decoder\.final_norm"):
        engine.step(step_data(STEPS), tokens_seen=STEPS)
    changed = [not torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True)]
    assert sum(changed) == 1  # the one that was broken by hand
    assert graphs.log[-2:] == ["replay", "replay"]


def test_a_new_network_begins_with_steps_that_run_as_they_are(
    groups: Any, graphs: type[Graph]
) -> None:
    for _ in range(2):
        engine = captured_engine(groups)
        for step in range(WARMUP + 1):
            engine.step(step_data(step), tokens_seen=step)
    assert graphs.log == (["passes"] * WARMUP + ["capture", "replay"]) * 2


def test_gradients_of_captured_steps_are_summed_beside_the_default_stream(
    groups: Any, graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.megatron import data_parallel

    inside: list[bool] = []
    made: list[bool] = []

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    usual = data_parallel.DistributedDataParallel

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        made.append(bool(inside))
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(data_parallel, "DistributedDataParallel", wrapper)
    captured_engine(groups)
    tiny_engine(tiny_job(PATTERN), groups)
    assert made == [True, False]
