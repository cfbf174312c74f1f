"""Checkpoints saved under one layout and loaded under another: the pairs, and what came of them.

    python -m tests.distributed.reshard    prints the table

Every layout takes two steps from the same first weights, saves, and takes three more; then every
pair loads what one layout saved under another, saves it again, and takes the three steps too.

Where the tolerance comes from. What is loaded is equal to the bit, so the losses of a pair differ
as those of two layouts do: they add the same terms in another order. Rounding a sum of K terms is a
walk of K steps of half an ulp, sqrt(K) / 2 ulps; through L layers the walks add up likewise.

- float32: rows of at most 164 features in 12 layers; sqrt(12 * 164) / 2, about 22 ulps for a token,
  are the bound for the mean of all 64.
- bfloat16: sums are float32, but about 3 activations of each of the 12 layers are rounded to
  bfloat16: sqrt(36) / 2 = 3 of its ulps for a token. Tokens are rounded each for itself, so for the
  mean of 64 of them 3 / sqrt(64) ulps are left, 65536 of float32 each.
- lowered: moments in bfloat16, masters as remainders. Moments that differ by an ulp of float32 are
  rounded alike but for one in 2^16, which leaves the bound of bfloat16.

An optimizer that lost its moments is off by far more: the first steps go the whole rate.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hybrid_train.runtime import cpu
from hybrid_train.schema.model import (
    Attention,
    AttentionSizes,
    LayerRule,
    Mamba,
    MambaSizes,
    MlpSizes,
    MoeSizes,
)
from hybrid_train.schema.optimizer import AdamW, MomentFormat
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.train import TrainJob
from tests.distributed.launch import run_distributed
from tests.tiny import as_family, microbatches, some_rows, tiny_engine, tiny_job

BEFORE, AFTER = 2, 3  # steps before the save, and after it
CUTS = {
    1: "MEM*M-E*/*E/*E",
    2: "MEM*|M-E*/*E/*E",
    4: "M|EM*|M-|E*/*E/*E",  # pieces of 1, 3, 2 and 2 layers
}


@dataclass(frozen=True)
class Layout:
    """A plan and how many processes run it."""

    processes: int
    parallel: Parallel
    bf16: bool = False
    reduced_state: bool = False  # moments in bfloat16
    offload_share: float = 0  # of the optimizer, in host memory
    unequal: bool = False  # some layers have sizes of their own
    dense: bool = False  # a Transformer with gates, biases, and norms of heads


ONE = "one process"
LAYOUTS = {
    ONE: Layout(1, Parallel()),
    "DP2": Layout(2, Parallel()),
    "DP2, optimizer whole": Layout(2, Parallel(distributed_optimizer=False)),
    "DP4": Layout(4, Parallel()),
    "TP2": Layout(2, Parallel(tensor=2)),
    "TP4": Layout(4, Parallel(tensor=4)),
    "PP2": Layout(2, Parallel(pipeline=2)),
    "PP4 uneven": Layout(4, Parallel(pipeline=4)),
    "PP2 x VPP2": Layout(2, Parallel(pipeline=2, virtual_pipeline=2)),
    "EP2": Layout(2, Parallel(expert=2)),
    "CP2": Layout(2, Parallel(context=2)),
    "DP2, overlapped": Layout(2, Parallel(overlap_grad_reduce=True, overlap_param_gather=True)),
    "ETP2": Layout(2, Parallel(expert_tensor=2)),
    "TP2 x EP2": Layout(2, Parallel(tensor=2, expert=2, expert_tensor=1)),
    "TP2 x DP2": Layout(4, Parallel(tensor=2)),
    "PP2 x EP2": Layout(4, Parallel(pipeline=2, expert=2)),
    "DP2, FSDP": Layout(2, Parallel(fsdp=True)),
    "TP2 x EP2 x DP2, FSDP": Layout(4, Parallel(tensor=2, expert=2, expert_tensor=1, fsdp=True)),
    "DP2, FSDP, bfloat16": Layout(2, Parallel(fsdp=True), bf16=True),
    "DP2, bfloat16": Layout(2, Parallel(), bf16=True),
    "TP2 x EP2, bfloat16": Layout(
        2, Parallel(tensor=2, expert=2, expert_tensor=1, distributed_optimizer=False), bf16=True
    ),
    "TP2, unequal": Layout(2, Parallel(tensor=2), unequal=True),
    "PP2 x EP2, unequal": Layout(4, Parallel(pipeline=2, expert=2), unequal=True),
    "TP2, dense": Layout(2, Parallel(tensor=2), dense=True),
    "PP2 x VPP2, dense": Layout(2, Parallel(pipeline=2, virtual_pipeline=2), dense=True),
    "DP2, FSDP, dense": Layout(2, Parallel(fsdp=True), dense=True),
    "DP2, lowered": Layout(2, Parallel(), bf16=True, reduced_state=True),
    "TP2, lowered": Layout(2, Parallel(tensor=2), bf16=True, reduced_state=True),
    "DP2, offloaded": Layout(
        2, Parallel(overlap_grad_reduce=True, overlap_param_gather=True), True, offload_share=0.5
    ),
    "EP2, offloaded": Layout(2, Parallel(expert=2), bf16=True, offload_share=1),
}
PAIRS = (
    ("EP2", ONE),
    (ONE, "EP2"),
    ("TP2", "PP2"),
    ("PP2", "TP2"),
    ("DP2", "DP2, optimizer whole"),
    ("DP2, optimizer whole", "EP2"),
    ("DP4", "TP2"),
    ("TP4", "DP2"),
    ("TP2", "TP4"),
    ("PP4 uneven", "PP2 x VPP2"),
    ("PP2 x VPP2", "PP4 uneven"),
    ("ETP2", "TP2 x EP2"),
    ("TP2 x EP2", "ETP2"),
    ("EP2", "TP2 x DP2"),
    ("TP2 x DP2", "PP2 x EP2"),
    ("PP2 x EP2", ONE),
    ("CP2", "DP2, overlapped"),
    ("DP2, overlapped", "CP2"),
    ("DP2", "DP2, FSDP"),
    ("DP2, FSDP", ONE),
    ("DP2, FSDP", "TP2 x EP2 x DP2, FSDP"),
    ("TP2 x EP2 x DP2, FSDP", "PP2"),
    ("DP2, FSDP, bfloat16", "TP2 x EP2, bfloat16"),
    ("DP2, bfloat16", "DP2, FSDP, bfloat16"),
    ("DP2, bfloat16", "TP2 x EP2, bfloat16"),
    ("TP2 x EP2, bfloat16", "DP2, bfloat16"),
    ("TP2, unequal", "PP2 x EP2, unequal"),
    ("PP2 x EP2, unequal", "TP2, unequal"),
    ("TP2, dense", "DP2, FSDP, dense"),
    ("DP2, FSDP, dense", "PP2 x VPP2, dense"),
    ("PP2 x VPP2, dense", "TP2, dense"),
    ("TP2, lowered", "DP2, lowered"),
    ("DP2, lowered", "TP2, lowered"),
    ("DP2, offloaded", "EP2, offloaded"),
    ("EP2, offloaded", "DP2, bfloat16"),
    ("DP2, bfloat16", "DP2, offloaded"),
)
# Every layout once or more, in half of the time; the others are in the table that is printed.
TESTED = (
    ("TP2", "PP2"),
    ("DP2", "DP2, optimizer whole"),
    ("DP2, optimizer whole", "EP2"),
    ("DP4", "TP2"),
    ("TP4", "DP2"),
    ("PP4 uneven", "PP2 x VPP2"),
    ("ETP2", "TP2 x EP2"),
    ("TP2 x DP2", "PP2 x EP2"),
    ("PP2 x EP2", ONE),
    ("CP2", "DP2, overlapped"),
    ("DP2, FSDP", "TP2 x EP2 x DP2, FSDP"),
    ("DP2, bfloat16", "DP2, FSDP, bfloat16"),
    ("DP2, FSDP, bfloat16", "TP2 x EP2, bfloat16"),
    ("TP2, unequal", "PP2 x EP2, unequal"),
    ("TP2, dense", "DP2, FSDP, dense"),
    ("DP2, FSDP, dense", "PP2 x VPP2, dense"),
    ("TP2, lowered", "DP2, lowered"),
    ("DP2, offloaded", "EP2, offloaded"),
)
# What `make test` has of those: tensors, stages, experts, data, FSDP; other masters; two processes.
SAMPLED = (
    ("TP2", "PP2"),
    ("DP2, optimizer whole", "EP2"),
    ("DP2, bfloat16", "DP2, FSDP, bfloat16"),
)
Pairs = tuple[tuple[str, str], ...]


EPSILON = torch.finfo(torch.float32).eps
FP32_ULPS = (12 * 164) ** 0.5 / 2
BF16_ULPS = 3 / 64**0.5 * torch.finfo(torch.bfloat16).eps / EPSILON


@dataclass(frozen=True)
class Row:
    """What came of one pair."""

    saved_under: str
    loaded_under: str
    expected: list[float]  # losses of the three steps of the run that never stopped
    found: list[float]
    tensors: int  # of the checkpoint: weights and optimizer state
    different: list[str]  # of those, what was not equal to the bit when saved again

    @property
    def ulps(self) -> float:
        """Largest deviation of a loss, in float32 ulps of it."""
        pairs = zip(self.found, self.expected, strict=True)
        return max(abs(found - expected) / (EPSILON * expected) for found, expected in pairs)

    @property
    def allowed_ulps(self) -> float:
        return BF16_ULPS if LAYOUTS[self.saved_under].bf16 else FP32_ULPS


def reshard_table(pairs: Pairs = PAIRS) -> list[Row]:
    """Run pairs of layouts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources, targets = ({pair[place] for pair in pairs} for place in (0, 1))
        for size in sorted({LAYOUTS[name].processes for name in sources}):
            run_distributed(_save, size, folder, sources)
        for size in sorted({LAYOUTS[name].processes for name in targets}):
            run_distributed(_load, size, folder, pairs)
        return [_row(folder, *pair) for pair in pairs]


def _row(folder: Path, source: str, target: str) -> Row:
    again = folder / _again(source, target)
    before, after = stored_tensors(folder / source), stored_tensors(again)
    different = [
        key
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or not torch.equal(before[key], after[key])
    ]
    return Row(source, target, _losses(folder / source), _losses(again), len(before), different)


def stored_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Read every tensor of the only checkpoint in a run folder, but the random states."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    reader = FileSystemReader(checkpoint)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("random.")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def job_of(layout: Layout) -> TrainJob:
    stages = layout.parallel.pipeline * layout.parallel.virtual_pipeline
    job = tiny_job(CUTS[stages], parallel=layout.parallel)
    job.model.attention = Attention(heads=4, kv_heads=4, head_dim=8)  # split four ways too
    job.model.mamba = Mamba(heads=4, head_dim=16, state_size=8, groups=4, chunk_size=8)
    job.train.microbatch = 1
    if layout.dense:
        job.model.pattern = "|".join(["*-" * (4 // stages)] * stages)
        as_family(job.model, "qwen")
    if layout.unequal:
        job.model.layers = [
            LayerRule(layers="3", mamba=MambaSizes(heads=8)),
            LayerRule(layers="7", moe=MoeSizes(experts=8, shared_intermediate_size=64)),
            LayerRule(layers="8", attention=AttentionSizes(heads=8)),
            LayerRule(mlp=MlpSizes(intermediate_size=96)),
        ]
    if layout.bf16:
        job.precision = Precision(format=GemmFormat.bf16)
    if layout.reduced_state:
        half = MomentFormat.bfloat16
        job.optimizer = AdamW(first_moment=half, second_moment=half)
    job.optimizer.offload_share = layout.offload_share
    return job


def _save(folder: Path, names: set[str]) -> None:
    """Under each of these layouts of as many processes: two steps, a checkpoint, three steps."""
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import content_of

    for name, engine in _engines(names):
        batches = _batches(engine)
        for _ in range(BEFORE):
            engine.step(batches, tokens_seen=0)
        store.save(folder / name, content_of(engine), {"step": BEFORE}, keep=1)
        _go_on(engine, batches, folder / name)


def _load(folder: Path, pairs: Pairs) -> None:
    """Load what other layouts saved, all into the same engine; save it again; three steps."""
    from hybrid_train.checkpoint import layout, store
    from hybrid_train.training.hooks.checkpointing import content_of

    for name, engine in _engines({target for _, target in pairs}, seed=99):
        for source, target in pairs:
            if target == name:
                store.load(layout.locate(folder / source), content_of(engine))
                run_dir = folder / _again(source, target)
                store.save(run_dir, content_of(engine), {"step": BEFORE}, keep=1)
                _go_on(engine, _batches(engine), run_dir)


def _engines(names: set[str], seed: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield an engine for each of these layouts of as many processes as there are."""
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    for name, layout in LAYOUTS.items():
        if name in names and layout.processes == dist.get_world_size():
            groups = build_groups(layout.parallel, timeout_s=60)
            job = job_of(layout)
            job.train.seed = seed or job.train.seed
            yield name, tiny_engine(job, groups)
            destroy_groups()


def _batches(engine: Any) -> Any:
    """Deal the sequences of a step out to the data-parallel ranks in turn."""
    groups = engine.network.groups
    return microbatches(some_rows()[groups.dp.rank() :: groups.dp.size()], 1)


def _go_on(engine: Any, batches: Any, run_dir: Path) -> None:
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(AFTER)]
    if dist.get_rank() == 0:
        (run_dir / "losses.json").write_text(json.dumps(losses))


def _losses(run_dir: Path) -> list[float]:
    return list(json.loads((run_dir / "losses.json").read_text()))


def _again(source: str, target: str) -> str:
    return f"{source} under {target}"


def main() -> int:
    """Print the table; return how many pairs fail."""
    rows = reshard_table()
    print("saved under             loaded under             expected     found   off by (ulps)")
    failed = 0
    for row in rows:
        bad = bool(row.different) or not row.ulps <= row.allowed_ulps
        failed += bad
        print(
            f"{row.saved_under:<23} {row.loaded_under:<23} {row.expected[-1]:9.6f} "
            f"{row.found[-1]:9.6f} {row.ulps:8.1f} of {row.allowed_ulps:5.0f}, {row.tensors} "
            f"tensors, {len(row.different)} different{'  FAILS' if bad else ''}"
        )
    print(f"losses of step {BEFORE + AFTER}; deviations are the largest of {AFTER} steps")
    return failed


if __name__ == "__main__":
    from tests.distributed import reshard  # the processes find its functions by this name

    sys.exit(reshard.main())
