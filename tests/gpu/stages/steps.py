"""Step time, MFU and memory of models as wide as published ones, cut in depth to fit the card."""

import gc
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybrid_train.anatomy.counts import flops_per_token
from hybrid_train.config import compose
from hybrid_train.jobs.run_plan import RunPlan
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.units import show_bytes, show_tokens
from hybrid_train.tracking.throughput import Throughput, peak_flops
from tests.benchmarks.fixed_batch import fixed_batch
from tests.gpu.stages.machine import card_bytes, flavour
from tests.gpu.stages.notes import Notes

# What `check` may count as kept, as a part of the card: at 32k tokens activations of such layers
# take about as much again, and what is gathered of the loss and of libraries beside it.
KEPT_SHARE = 1 / 3
MEMORY_SHARE = 1 / 4  # where a model is built for its bytes alone
LENGTHS, PLAIN_LENGTHS = (4096, 8192, 16384, 32768), (64, 128)
WARM_UP, LEAST_STEPS, MOST_STEPS, TIMED_S = 2, 3, 20, 4.0
WORKSPACES = 6 * 2**25  # bytes: torch's and Transformer Engine's of cuBLAS, 32 MiB each on Hopper
ROUNDED = 512  # bytes that torch's allocator takes at least for a tensor
COUNT_OFF = 0.01  # what is not counted: scales, routers' records, padding of buffers
TINY = (
    "model.hidden_size=64", "model.vocab_size=512", "model.attention.heads=4",
    "model.attention.kv_heads=2", "model.attention.head_dim=16", "model.mamba.heads=8",
    "model.mamba.head_dim=16", "model.mamba.state_size=16", "model.mamba.groups=2",
    "model.mamba.chunk_size=16",
)  # fmt: skip
TINY_MLP = ("model.mlp.intermediate_size=128",)
TINY_MOE = (
    "model.moe.experts=4", "model.moe.top_k=2", "model.moe.intermediate_size=64",
    "model.moe.shared_intermediate_size=64",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A published model, and what is made smaller of it beside its depth."""

    model: str
    tiny: tuple[str, ...]
    smaller: tuple[str, ...] = ()


DENSE_4B = Case("nemotron_h_4b", (*TINY, *TINY_MLP))
DENSE_8B = Case("nemotron_h_8b", (*TINY, *TINY_MLP))
EXPERTS = Case("nemotron3_nano", (*TINY, *TINY_MOE), ("model.moe.experts=32",))


def steps_4b(notes: Notes) -> None:
    """Time steps at the width of Nemotron-H 4B."""
    time_case(notes, DENSE_4B)


def steps_8b(notes: Notes) -> None:
    """Time steps at the width of Nemotron-H 8B."""
    time_case(notes, DENSE_8B)


def steps_moe(notes: Notes) -> None:
    """Time steps at the width of Nemotron 3 Nano, with a quarter of its experts."""
    time_case(notes, EXPERTS)


def time_case(notes: Notes, case: Case) -> None:
    """Time a model at each length; one that does not fit is a row that says so."""
    lengths = PLAIN_LENGTHS if notes.plain else LENGTHS
    plan = deepest(case, notes.plain, lengths[-1], KEPT_SHARE)
    note_plan(notes, case, plan)
    with engine_of(notes, plan, lengths[-1]) as engine:
        for length in lengths:
            try:
                time_length(notes, engine, plan, length)
            except torch.OutOfMemoryError as error:
                notes.skipped(f"{length} tokens", f"out of memory: {str(error).splitlines()[0]}")
                release(notes)


def overrides(case: Case, plain: bool, length: int, pattern: str | None = None) -> list[str]:
    """The settings of a run of one model on one device."""
    smaller = case.tiny if plain else case.smaller
    return [
        "experiment=tiny_cpu", "run_dir=/nonexistent", f"model={case.model}", "precision=bf16",
        "runtime=auto", f"runtime.device={'cpu' if plain else 'cuda'}",
        f"train.sequence_length={length}", "train.microbatch=1", "train.global_batch=1",
        "train.tokens=10M", *smaller, *([f"model.pattern={pattern}"] if pattern else []),
    ]  # fmt: skip


def deepest(case: Case, plain: bool, length: int, share: float) -> RunPlan:
    """Return the plan, as `check` makes it, of the most layers that keep a share of the card."""
    job = compose.compose("check", [*overrides(case, plain, length), "processes=1"])
    whole, room = job.model.pattern, share * card_bytes(plain)
    for pattern in (whole[:depth] for depth in range(len(whole), 0, -1)):
        if set(pattern) != set(whole):
            break
        plan = RunPlan.of(replace(job, model=replace(job.model, pattern=pattern)))
        if plan.most_kept() <= room:
            return plan
    raise AssertionError(f"{case.model}: one layer of each kind keeps more than {show_bytes(room)}")


def note_plan(notes: Notes, case: Case, plan: RunPlan) -> None:
    """Say what is timed: layers, parameters, bytes, and that this is not the whole model."""
    whole = compose.compose("train", overrides(case, notes.plain, 64)).model.pattern
    pattern = plan.job.model.pattern
    kept = plan.kept_of_rank(0)
    size = sum(one.held.total for one in plan.stages)
    notes.row("layers", len(pattern), note=f"{pattern}, of {len(whole)} of {case.model}")
    notes.row("parameters", size, note=show_tokens(size), headline=True)
    notes.row(
        "kept by `check`", kept.total, "bytes",
        note=f"weights {show_bytes(kept.weights)}, gradients {show_bytes(kept.gradients)}, "
        f"optimizer {show_bytes(kept.optimizer)}",
    )  # fmt: skip


@contextmanager
def engine_of(notes: Notes, plan: RunPlan, length: int) -> Iterator[Any]:
    """Build the engine of a plan on this process."""
    from hybrid_train.runtime.start import process

    job = plan.job
    with process(job.runtime, seed=1234) as device:
        from hybrid_train.jobs.networks import build_engine
        from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
        from hybrid_train.model.build import build_model

        groups = build_groups(Parallel(), timeout_s=60)
        start = time.perf_counter()
        built = build_model(job, groups, plan.rows, on_gpu=device.type == "cuda")
        notes.flavour(flavour(built.kernels))
        engine = build_engine(job, built, groups, device)
        del built
        notes.row("building", time.perf_counter() - start, "s")
        assert engine.sequence_length == length
        try:
            yield engine
        finally:
            destroy_groups()


def time_length(notes: Notes, engine: Any, plan: RunPlan, length: int) -> None:
    """Time steps of one row of `length` tokens."""
    device, rows = engine.network.device, plan.rows
    engine.sequence_length = length
    batch = fixed_batch(rows, 1, length).to(device)
    for _ in range(WARM_UP):
        engine.step(iter([batch]), tokens_seen=10**6)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < LEAST_STEPS or (sum(times) < TIMED_S and len(times) < MOST_STEPS):
        start = time.perf_counter()
        report = engine.step(iter([batch]), tokens_seen=10**6)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = peak_flops(device)
    flops = flops_per_token(plan.job.model, rows, length).training
    measured = Throughput(peak.flops, 1).measure(length, statistics.median(times), flops)
    name = f"{length} tokens"
    notes.row(f"{name}: step", 1000 * measured["step_time_s"], "ms", note=f"of {len(times)} steps")
    notes.row(f"{name}: speed", measured["tokens_per_s"], "tokens/s")
    if "mfu" in measured:
        notes.row(f"{name}: MFU", measured["mfu"], headline=True, note=peak.source)
    if device.type == "cuda":
        notes.row(f"{name}: peak memory", torch.cuda.max_memory_allocated(), "bytes")
    # A model that has learnt nothing has the loss of a guess.
    limit = 2 * math.log(rows)
    notes.row(f"{name}: loss", report.loss, "nats", limit=limit, note="twice that of a guess")


def release(notes: Notes) -> None:
    """Give back what a step that failed has left."""
    gc.collect()
    if not notes.plain:
        torch.cuda.empty_cache()


# memory ------------------------------------------------------------------------------------------


def memory(notes: Notes) -> None:
    """Compare what a model keeps from step to step with what `check` counts."""
    length = PLAIN_LENGTHS[0] if notes.plain else LENGTHS[0]
    plan = deepest(DENSE_4B, notes.plain, length, MEMORY_SHARE)
    note_plan(notes, DENSE_4B, plan)
    before = bytes_alive(notes)
    with engine_of(notes, plan, length) as engine:
        batch = fixed_batch(plan.rows, 1, length).to(engine.network.device)
        notes.row("held before the first step", bytes_alive(notes) - before, "bytes")
        for _ in range(WARM_UP):
            engine.step(iter([batch]), tokens_seen=10**6)
        release(notes)
        kept = bytes_alive(notes) - before
        tensors = len(list(engine.network.chunks[0].parameters()))
        if not notes.plain:
            notes.row("peak of a step", torch.cuda.max_memory_allocated() - before, "bytes")
    counted = plan.kept_of_rank(0).total
    # Of each parameter weight, gradient, master and two moments.
    spare = COUNT_OFF * counted + 5 * ROUNDED * tensors + (0 if notes.plain else WORKSPACES)
    notes.row("kept after two steps", kept, "bytes", headline=True)
    notes.row(
        "more or less than counted", abs(kept - counted), "bytes", limit=spare,
        note=f"{COUNT_OFF:.0%}, {5 * ROUNDED} bytes a parameter, workspaces of cuBLAS",
    )  # fmt: skip


def bytes_alive(notes: Notes) -> int:
    """Bytes of all tensors: on the card by its allocator, on a CPU by looking at each."""
    if not notes.plain:
        return int(torch.cuda.memory_allocated())
    gc.collect()
    storages: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and not one.is_meta:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
