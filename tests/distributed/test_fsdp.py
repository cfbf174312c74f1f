"""Megatron-FSDP on two processes: parts make up the whole; what it computes: tests/parity."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.distributed.launch import run_distributed
from tests.tiny import MEGATRON_WARNINGS, batch_of, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
PLAIN, SPLIT = Parallel(), Parallel(fsdp=True)
POISONED = "decoder.layers.2.mixer.out_proj.weight"


def _engine(parallel: Parallel, number_format: GemmFormat = GemmFormat.fp32) -> Any:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups

    destroy_groups()
    groups = build_groups(parallel, timeout_s=60)
    job = tiny_job(parallel=parallel, precision=Precision(format=number_format))
    job.train.microbatch = 1
    return tiny_engine(job, groups)


def on_two_processes(function: Callable[[], Any]) -> list[Any]:
    return run_distributed(_then_tidy, 2, function)


def _then_tidy(function: Callable[[], Any]) -> Any:
    """Leave no groups behind: the processes serve other tests too."""
    from hybrid_train.megatron.data_parallel import destroy_groups

    try:
        return function()
    finally:
        destroy_groups()


def _step(engine: Any) -> Any:
    rows = some_rows()[dist.get_rank() :: dist.get_world_size()]
    return engine.step(microbatches(rows, 1), tokens_seen=0)


def _sizes_of_parts() -> dict[str, tuple[int, int, int]]:
    """Return of each tensor: elements of its weight and gradient here, and in the whole model."""
    from tests.parity import shards

    engine = _engine(SPLIT)
    _step(engine)
    sizes: dict[str, tuple[int, int, int]] = {}
    for number, held in enumerate((shards.weights, shards.gradients)):
        for shard in held(engine.network.chunks):
            counts = list(sizes.get(shard.key, (0, 0, math.prod(shard.whole_shape))))
            counts[number] += shard.value.numel()
            sizes[shard.key] = (counts[0], counts[1], counts[2])
    return sizes


def test_parts_make_up_the_whole_and_none_is_held_twice() -> None:
    ranks = on_two_processes(_sizes_of_parts)
    for key in ranks[0].keys() | ranks[1].keys():
        parts = [rank[key] for rank in ranks if key in rank]
        whole = parts[0][2]
        if key.endswith("expert_bias"):  # a buffer, whole on every rank
            assert [part[0] for part in parts] == [whole, whole]
        else:
            assert sum(part[0] for part in parts) == whole, key
            assert sum(part[1] for part in parts) == whole, key
    held = [sum(part[0] for part in rank.values()) for rank in ranks]
    # A tensor is cut between rows, so the halves are not equal to the element.
    assert held[0] == pytest.approx(held[1], rel=0.05)


def _memory_between_steps() -> tuple[int, int]:
    """Return the bytes of whole layers that are there between two steps, and without FSDP."""
    engine = _engine(SPLIT)
    _step(engine)
    core = engine.network.chunks[0].module
    groups = core.param_and_grad_buffer.parameter_groups
    layers = [
        parameter
        for parameter in core.raw_param.values()
        if groups[core.param_and_grad_buffer.param_to_param_group[parameter]].fsdp_unit_id
        is not None
    ]
    there = sum(parameter.untyped_storage().nbytes() for parameter in layers)
    return there, sum(parameter.nbytes for parameter in layers)


def test_no_layer_is_whole_between_two_steps() -> None:
    for there, whole in on_two_processes(_memory_between_steps):
        assert whole > 0
        assert there == 0


def _evaluate_and_go_on() -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Evaluate between two steps; the same without FSDP; losses of the step after each."""
    found, losses = [], []
    for parallel in (PLAIN, SPLIT):
        engine = _engine(parallel)
        _step(engine)
        found.append(engine.evaluate([batch_of(rows) for rows in some_rows(seed=7).split(1)]))
        losses.append(_step(engine).loss)
    return found[0], found[1], losses


@pytest.mark.slow
def test_evaluation_sees_the_updated_weights_and_leaves_them() -> None:
    for plain, split, (before, after) in on_two_processes(_evaluate_and_go_on):
        assert split == pytest.approx(plain, rel=1e-6)
        assert after == pytest.approx(before, rel=1e-6)


def _gradient_goes_bad() -> tuple[str, bool]:
    """Let one element of a gradient be infinite on the rank that keeps it."""
    from hybrid_train.training.bad_steps import NonFiniteError
    from tests.parity import shards

    engine = _engine(SPLIT)
    core, finalize = engine.network.chunks[0].module, engine.network.finalizer

    def spoil(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        parts = dict(core.param_and_grad_buffer.optimizer_named_parameters)
        if parts[POISONED].grad is not None:
            parts[POISONED].grad.to_local().view(-1)[0] = math.inf

    engine.network.chunks[0].config.finalize_model_grads_func = spoil
    before = [shard.value.clone() for shard in shards.weights(engine.network.chunks)]
    with pytest.raises(NonFiniteError) as error:
        _step(engine)
    after = [shard.value for shard in shards.weights(engine.network.chunks)]
    return str(error.value), all(map(torch.equal, before, after))


def test_a_bad_gradient_is_named_and_nothing_is_updated() -> None:
    for words, is_unchanged in on_two_processes(_gradient_goes_bad):
        assert "first in the backward pass on rank" in words
        assert f"parameter {POISONED}" in words
        assert is_unchanged


def _weight_goes_bad() -> str:
    from hybrid_train.megatron import data_parallel
    from hybrid_train.training.bad_steps import NonFiniteError

    engine = _engine(SPLIT)
    names = {id(weight): name for name, weight in engine.network.chunks[0].module.raw_param.items()}
    for part in data_parallel.fsdp_parts(engine.network.chunks[0]):
        if names[id(part.parameter)] == POISONED:
            part.weights[0] = math.nan
    with pytest.raises(NonFiniteError) as error:
        _step(engine)
    return str(error.value)


@pytest.mark.slow
def test_a_bad_weight_is_found_in_the_forward_pass() -> None:
    for words in on_two_processes(_weight_goes_bad):
        module = POISONED.removesuffix(".weight")
        assert (
            f"first in the forward pass on rank 0, module {module} (its weight not finite);"
            in words
        )


def _gradients_in_bfloat16(parallel: Parallel) -> list[Any]:
    from tests.parity import shards

    engine = _engine(parallel, GemmFormat.bf16)
    _step(engine)
    found = list(shards.gradients(engine.network.chunks))
    assert {shard.value.dtype for shard in found} == {torch.float32}
    return found


def _compare_in_bfloat16() -> dict[str, float]:
    """Return the deviation of each gradient from that without FSDP, relative to it."""
    from tests.parity import shards

    plain = shards.assemble(iter(_gradients_in_bfloat16(PLAIN)))
    squares: dict[str, list[float]] = {}
    for part in _gradients_in_bfloat16(SPLIT):
        expected = plain[part.key][part.place]
        off, size = squares.setdefault(part.key, [0.0, 0.0])
        off += (part.value - expected).square().sum().item()
        squares[part.key] = [off, size + expected.square().sum().item()]
    return {key: math.sqrt(off / size) for key, (off, size) in squares.items()}


@pytest.mark.slow
def test_bfloat16_gradients_differ_by_their_rounding_alone() -> None:
    for deviations in on_two_processes(_compare_in_bfloat16):
        assert len(deviations) > 20
        # On a CPU linear layers add their products to the float32 buffer directly; under FSDP each
        # is rounded to bfloat16 first, by half of 2^-8 at most, for each of two microbatches.
        assert max(deviations.values()) < 2**-8, max(deviations.items(), key=lambda one: one[1])
