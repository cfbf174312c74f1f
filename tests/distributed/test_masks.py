"""A masked model under every split is the small model on one process, in a whole training step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_train.anatomy.selection import Selection
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.compression import slicing
from hybrid_train.runtime import cpu
from hybrid_train.schema.model import Model
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.train import TrainJob
from tests.distributed.launch import run_distributed
from tests.distributed.test_packed import gathered, rows, run
from tests.packed import packed_batch
from tests.pruned import SIZES, child_of, disturb, roomy, selection_of
from tests.tiny import MEGATRON_WARNINGS, VOCAB, alone, tiny_engine, tiny_job

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.slow]
STAGES = ("ME-|*ME|M*|E-", "/*E/*E")
LAYOUTS = {
    "tensor": Parallel(tensor=2),
    "more ranks than key heads": Parallel(tensor=2),
    "pipeline": Parallel(pipeline=2),
    "virtual pipeline": Parallel(pipeline=2, virtual_pipeline=2),
    "expert": Parallel(expert=2),
    "tensor, experts by number": Parallel(tensor=2, expert=2, expert_tensor=1),
    "context": Parallel(context=2),
}
WHOLE = Path("checkpoints") / "step_00000000"
DROPPED = (4, 9)
LENGTH = 16
ROWS = 64  # of the vocabulary


def parent_job(parallel: Parallel, kv_heads: int) -> TrainJob:
    stages = parallel.pipeline * parallel.virtual_pipeline
    parts = STAGES[0].split("|")
    cut = {1: ["".join(parts)], 2: ["".join(parts[:2]), "".join(parts[2:])], 4: parts}[stages]
    job = tiny_job("|".join(cut) + STAGES[1], parallel=parallel)
    job.model = roomy(job.model)
    job.model.attention.kv_heads = kv_heads
    job.train.microbatch, job.train.global_batch = 1, 2
    return job


def drawn(parent: Any, seed: int) -> tuple[Any, Any]:
    """A child of a model that is cut along all axes, and by layers; what it keeps."""
    axes = [axis for axis in SIZES if axis.value != "attention.kv_heads"]
    random = np.random.default_rng(seed)
    child = child_of(parent, axes, random, DROPPED)
    return child, selection_of(parent, child, random, DROPPED)


def cut_out(source: Path, parent: Model, child: Model, selection: Selection) -> Path:
    """Cut the child out of a checkpoint as prune does."""
    folder = source.with_name("child")
    folder.mkdir()
    with StoredTensors(source) as stored:
        slicing.write(folder, stored, slicing.slices(parent, child, selection, ROWS))
    return folder


def outcome(engine: Any, groups: Any) -> tuple[dict[str, float], Tensor | None]:
    """What a step says, and the logits after it, of both rows and all depths."""
    own = rows()[groups.dp.rank() :: groups.dp.size()]
    batches = [packed_batch([row], LENGTH) for row in own]
    report = engine.step(iter(batches), tokens_seen=0)  # which gives context ranks their parts
    batches = [one.part_of(groups.cp.rank(), groups.cp.size()) for one in batches]
    said = {"loss": report.loss, "norm": report.grad_norm, **report.metrics}
    found = run(engine, batches)
    if not found:
        return said, None
    from hybrid_train.ops.context import in_order

    logits = gathered(torch.stack(found).squeeze(2), groups.tp, axis=-1)
    logits = in_order(gathered(logits, groups.cp, axis=1), groups.cp.size(), dim=1)
    logits = logits.unflatten(0, (len(batches), -1))
    if groups.dp.size() > 1:  # each has a row
        logits = gathered(logits, groups.dp, axis=0)
    return said, logits


def _masked(weights: Path, seed: int) -> dict[str, Any]:
    cpu.install()
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.compression.mask import Mask
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.model.build import build_model
    from hybrid_train.model.edits import apply_edits

    said = {}
    for name, parallel in LAYOUTS.items():
        kv_heads = 1 if "key heads" in name else 2
        job = parent_job(parallel, kv_heads)
        groups = build_groups(parallel, timeout_s=60)
        built = build_model(job, groups, VOCAB, on_gpu=False)
        read_weights(weights / str(kv_heads) / WHOLE, built.chunks, groups)
        selection = drawn(job.model, seed)[1]
        apply_edits([Mask(selection)], built.chunks)
        engine = build_engine(job, built, groups, torch.device("cpu"))
        engine.network.routing = engine.network.routing.masked(selection)
        said[name] = outcome(engine, groups)
        destroy_groups()
    return said


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What the small models said on one process, by key heads; what every rank said masked."""
    folder, small = tmp_path_factory.mktemp("parent"), {}
    with alone() as groups:
        from hybrid_train.checkpoint import store
        from hybrid_train.checkpoint.save_load import read_weights
        from hybrid_train.jobs.networks import build_engine
        from hybrid_train.model.build import build_model
        from hybrid_train.training.hooks.checkpointing import content_of

        for kv_heads in (1, 2):
            job = parent_job(Parallel(), kv_heads)
            parent = tiny_engine(job, groups)
            model = parent.network.chunks[0].module
            disturb(model)
            store.save(folder / str(kv_heads), content_of(parent), {"step": 0, "tokens": 0}, keep=1)
            child, selection = drawn(job.model, 1)
            of_child = parent_job(Parallel(), kv_heads)
            of_child.model = child
            built = build_model(of_child, groups, VOCAB, on_gpu=False)
            source = folder / str(kv_heads) / WHOLE
            read_weights(cut_out(source, job.model, child, selection), built.chunks, groups)
            engine = build_engine(of_child, built, groups, torch.device("cpu"))
            small[kv_heads] = outcome(engine, groups)
    return small, run_distributed(_masked, 2, folder, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_the_masked_model_is_one_of_the_small_one(layout: str, both: Any) -> None:
    small, ranks = both
    wanted, wanted_logits = small[1 if "key heads" in layout else 2]
    found, _ = ranks[0][layout]
    logits = next(rank[layout][1] for rank in ranks if rank[layout][1] is not None)
    # By the numbers of the parent: 4 and 9 of its layers are not there.
    renamed = {"expert_load_5": "expert_load_6"}
    assert set(found) == {renamed.get(name, name) for name in wanted}
    for name, value in wanted.items():
        same = found[renamed.get(name, name)]
        assert same == pytest.approx(value, rel=2e-5), name
    apart = (logits - wanted_logits).abs().max() / wanted_logits.abs().max()
    assert apart < 1e-5, apart
