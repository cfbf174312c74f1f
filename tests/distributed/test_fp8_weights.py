"""Runs whose weights are kept and gathered in FP8, against the same with bfloat16 weights.

Products take the same operands, so nothing but the memory may differ. Gradients are clipped in
neither: the norm is summed in the order of the buffers, which are others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.distributed.launch import run_distributed
from tests.distributed.reshard import stored_tensors
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, as_family, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
STEPS = 3
TENSORWISE, BLOCKWISE = GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise
DP2, EP2 = Parallel(), Parallel(expert=2)
CASES = {
    "DP2": (2, DP2, BLOCKWISE),
    "DP2, overlapped": (
        2,
        Parallel(overlap_grad_reduce=True, overlap_param_gather=True),
        TENSORWISE,
    ),
    "TP2 x DP2": (4, Parallel(tensor=2), TENSORWISE),
    "EP2": (2, EP2, BLOCKWISE),
    "PP2 x DP2": (4, Parallel(pipeline=2), TENSORWISE),
}


def engine_of(
    parallel: Parallel, groups: Any, format: GemmFormat, gathered: bool, family: str = ""
) -> Any:
    pattern = "MEM*|M-/*E/*E" if parallel.pipeline > 1 else "MEM*M-/*E/*E"
    job = tiny_job("*-*-*-" if family else pattern, parallel=parallel)
    if family:
        as_family(job.model, family)
    job.precision = Precision(format=format, fp8_param_gather=gathered)
    job.optimizer.clip_grad_norm = 1e9
    job.train.microbatch = 1
    return tiny_engine(job, groups)


def batches_of(groups: Any) -> Any:
    return microbatches(some_rows()[groups.dp.rank() :: groups.dp.size()], 1)


def in_groups(parallel: Parallel, work: Any) -> Any:
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    groups = build_groups(parallel, timeout_s=60)
    try:
        return work(groups)
    finally:
        destroy_groups()


@dataclass(frozen=True)
class Outcome:
    """What came of a run on one process."""

    losses: list[float]
    buffers: int  # bytes that parameters are gathered in
    in_fp8: int  # parameters that are kept so


def train(
    groups: Any,
    parallel: Parallel,
    format: GemmFormat,
    gathered: bool,
    folder: Path,
    start: Path | None,
    family: str = "",
) -> Outcome:
    """Take steps from new weights or a checkpoint, and save."""
    from hybrid_train.checkpoint import layout, store
    from hybrid_train.megatron.checkpoints import is_in_fp8
    from hybrid_train.megatron.data_parallel import complete_parameters
    from hybrid_train.training.hooks.checkpointing import content_of

    engine = engine_of(parallel, groups, format, gathered, family)
    content = content_of(engine)
    if start is not None:
        found = layout.latest(start)
        assert found is not None
        store.load(found, content)
    batches = batches_of(groups)
    losses = [engine.step(batches, tokens_seen=0).loss for _ in range(STEPS)]
    complete_parameters(engine.network.chunks)
    store.save(folder, content, {"step": STEPS, "tokens": 0}, keep=1)
    buffers = [b for c in engine.network.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    weights = [weight for chunk in engine.network.chunks for weight in chunk.parameters()]
    return Outcome(
        losses,
        sum(buffer.param_data.nbytes for buffer in buffers),
        sum(weight.numel() for weight in weights if is_in_fp8(weight)),
    )


def train_both(
    parallel: Parallel,
    format: GemmFormat,
    folder: Path,
    start: Path | None = None,
    family: str = "",
) -> tuple[Outcome, Outcome]:
    """Run with bfloat16 weights and with weights in FP8; save to "plain" and "kept"."""

    def work(groups: Any) -> tuple[Outcome, Outcome]:
        both = (False, folder / "plain", start, family), (True, folder / "kept", start, family)
        plain, kept = (train(groups, parallel, format, *one) for one in both)
        return plain, kept

    return in_groups(parallel, work)


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", sampled(CASES, next(iter(CASES))))
def test_losses_and_checkpoints_are_those_of_bfloat16_weights(name: str, tmp_path: Path) -> None:
    processes, parallel, format = CASES[name]
    for plain, kept in run_distributed(train_both, processes, parallel, format, tmp_path):
        assert kept.losses == plain.losses
        assert plain.in_fp8 == 0
        assert kept.in_fp8 > 10_000
        # a byte less for each; buffers are padded
        assert kept.buffers < plain.buffers - 0.95 * kept.in_fp8
    require_equal(*(stored_tensors(tmp_path / name) for name in ("kept", "plain")))


def test_gates_and_biases_of_a_transformer_are_kept_and_saved_as_they_are(tmp_path: Path) -> None:
    """A matrix of gates and neurons is one weight in FP8, and two runs of rows in a checkpoint."""
    work = (Parallel(tensor=2), TENSORWISE, tmp_path, None, "qwen")
    for plain, kept in run_distributed(train_both, 2, *work):
        assert kept.losses == plain.losses
        assert kept.in_fp8 > 10_000
    require_equal(*(stored_tensors(tmp_path / name) for name in ("kept", "plain")))


@pytest.mark.slow
@pytest.mark.parametrize("before", sampled(["kept", "plain"], "kept"))
def test_a_checkpoint_goes_on_either_way_under_another_layout(before: str, tmp_path: Path) -> None:
    """From two data-parallel ranks to experts on two, with weights kept otherwise, or not."""
    run_distributed(train_both, 2, DP2, TENSORWISE, tmp_path / "first")
    start, then = tmp_path / "first" / before, tmp_path / "then"
    for plain, kept in run_distributed(train_both, 2, EP2, TENSORWISE, then, start):
        assert kept.losses == plain.losses
    require_equal(*(stored_tensors(then / name) for name in ("kept", "plain")))


def masters_of_loaded_weights(start: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Load weights alone; return each master of a weight in FP8, and the weight's first values."""

    def work(groups: Any) -> Any:
        from hybrid_train.checkpoint import layout
        from hybrid_train.checkpoint.save_load import read_weights
        from hybrid_train.megatron.checkpoints import is_in_fp8

        engine = engine_of(Parallel(), groups, TENSORWISE, True)
        found = layout.latest(start)
        assert found is not None
        read_weights(found.path, engine.network.chunks, groups)
        engine.network.optimizer.reload_model_params()
        named = engine.network.chunks[0].module.module.named_parameters()
        return {
            name: weight.main_param.view(weight.shape).clone()
            for name, weight in named
            if is_in_fp8(weight)
        }

    return in_groups(Parallel(), work)


@pytest.mark.slow
def test_masters_begin_with_loaded_weights_and_not_with_what_they_were_rounded_to(
    tmp_path: Path,
) -> None:
    run_distributed(train_both, 1, Parallel(), TENSORWISE, tmp_path)
    (masters,) = run_distributed(masters_of_loaded_weights, 1, tmp_path / "kept")
    stored = stored_tensors(tmp_path / "kept")
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    assert masters[name].dtype == torch.float32
    assert torch.equal(masters[name], stored[name].float())
