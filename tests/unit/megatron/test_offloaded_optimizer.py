"""A share of the optimizer in host memory takes the steps of the whole one, to the bit.

The host's updates are those of torch's AdamW on a CPU on either side, so no rounding differs. On a
CPU what stays on the GPU is updated by torch's AdamW too, or here by a stand-in for Transformer
Engine's FusedAdam, which counts steps by group.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.planning.memory import Held, memory
from hybrid_train.schema.optimizer import AdamW, ParameterKind
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import GemmFormat, Precision
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
FP32, BF16 = GemmFormat.fp32, GemmFormat.bf16
STEPS = 4
SHARES = (0.001, 0.5, 1.0)  # the least takes some of the float32 decays, and leaves others


@pytest.fixture(params=[False, True], ids="as_on_gpu={}".format)
def adam_of_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Update what stays by the class that stands for Transformer Engine's."""
    if request.param:
        from megatron.core import optimizer as core

        from hybrid_train.optim.fused_adam import FusedAdam

        monkeypatch.setattr(core, "Adam", FusedAdam)


def engine_of(groups: Any, share: float, format: GemmFormat = BF16, **adamw: Any) -> Any:
    job = tiny_job(precision=Precision(format=format), schedule=tiny_job().schedule)
    job.optimizer = AdamW(offload_share=share, clip_grad_norm=0.5, **adamw)
    return tiny_engine(job, groups)


def take(engine: Any, steps: int = STEPS, seed: int = 0) -> list[tuple[float, float]]:
    batches = microbatches(some_rows(seed=seed), 2)
    reports = [engine.step(batches, tokens_seen=0) for _ in range(steps)]
    return [(report.loss, report.grad_norm) for report in reports]


def weights_of(engine: Any) -> list[Tensor]:
    return [weight.detach().clone() for weight in engine.network.chunks[0].parameters()]


def offloaded(engine: Any) -> dict[Tensor, Tensor]:
    """What is updated in host memory: copies by the part of a weight that they are of."""
    (part,) = engine.network.optimizer.chained_optimizers
    return dict(part.optimizer.gpu_params_map_cpu_copy)


def state_by_name(engine: Any) -> Iterator[tuple[int, str, Tensor]]:
    """Masters and moments by the numbers of their parameters."""
    from hybrid_train.megatron.optimizers import state_of_updated, updated_by

    numbers = {id(one): n for n, one in enumerate(engine.network.chunks[0].parameters())}
    for part in engine.network.optimizer.chained_optimizers:
        for parameter, _, updated in updated_by(part):
            number, state = numbers[id(parameter)], state_of_updated(part, updated)
            yield number, "weight", updated.detach().clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                yield number, kind, state[kind].clone()


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.usefixtures("adam_of_gpu")
@pytest.mark.parametrize("format", [FP32, BF16])
@pytest.mark.parametrize("share", sampled(SHARES, 0.001, 1.0))
def test_steps_weights_and_state_are_those_of_the_whole_optimizer(
    groups: Any, share: float, format: GemmFormat
) -> None:
    whole, shared = engine_of(groups, 0, format), engine_of(groups, share, format)
    begun = weights_of(shared)
    assert take(shared) == take(whole)
    assert same(weights_of(shared), weights_of(whole))
    moved = [not torch.equal(*pair) for pair in zip(begun, weights_of(shared), strict=True)]
    assert sum(moved) > 0.8 * len(moved)  # float32 decays move, small steps of bfloat16 do not all
    found, expected = list(state_by_name(shared)), list(state_by_name(whole))
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert same([one[2] for one in found], [one[2] for one in expected])


@pytest.mark.parametrize("share", SHARES)
def test_what_is_offloaded_reaches_the_share_and_no_tensor_more(groups: Any, share: float) -> None:
    engine = engine_of(groups, share)
    sizes = [weight.numel() for weight in engine.network.chunks[0].parameters()]
    taken = [part.numel() for part in offloaded(engine)]
    assert sum(taken[:-1]) < share * sum(sizes) <= sum(taken)


def test_the_bytes_of_either_memory_are_those_of_the_plan(groups: Any) -> None:
    """A weight's memory is the model's; all else that is updated on the GPU is counted."""
    for share in SHARES:
        engine = engine_of(groups, share)
        take(engine, 1)
        parameters = list(engine.network.chunks[0].parameters())
        precise = sum(p.numel() for p in parameters if p.dtype == torch.float32)
        held = Held(sum(p.numel() for p in parameters), in_fp32=precise)
        planned = memory(engine_job(share), held, processes=1)
        (part,) = engine.network.optimizer.chained_optimizers
        inner = part.optimizer
        copies = set(inner.cpu_copys_map_gpu_param)
        host = here = 0
        for weight, updated in inner.param_to_inner_param.items():
            state = inner.state[weight]
            moments = state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
            if updated in copies:
                host += updated.nbytes + moments + updated.grad.nbytes
            else:
                here += moments + (0 if updated is weight else updated.nbytes)
        most = max(p.numel() for p in parameters)
        assert planned.host <= host < planned.host + 16 * (most + 1)
        assert planned.optimizer - 12 * (most + 1) < here <= planned.optimizer
        if share == 1:
            assert (here, host) == (planned.optimizer, planned.host)


def engine_job(share: float) -> Any:
    job = tiny_job(precision=Precision(format=BF16), parallel=Parallel())
    job.optimizer = AdamW(offload_share=share)
    return job


@pytest.mark.parametrize("format", [FP32, BF16])
def test_host_copies_are_memory_of_their_own_and_float32(groups: Any, format: GemmFormat) -> None:
    engine = engine_of(groups, 1, format)
    take(engine, 1)
    copies = offloaded(engine)
    assert len(copies) == len(list(engine.network.chunks[0].parameters()))
    for part, copy in copies.items():
        assert copy.dtype == torch.float32
        assert copy.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
        assert torch.equal(copy.to(part.dtype), part)


def test_of_whole_weights_there_is_no_copy(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core builds the optimizer once for whole weights, then again for this process's parts."""
    from hybrid_train.megatron.offloaded_optimizer import OffloadedAdamW

    copied: list[Tensor] = []
    copy_of = OffloadedAdamW._host_copy

    def listen(self: Any, part: Tensor) -> Tensor:
        copied.append(part)
        return copy_of(self, part)

    monkeypatch.setattr(OffloadedAdamW, "_host_copy", listen)
    engine = engine_of(groups, 1)
    assert len(copied) == len(list(engine.network.chunks[0].parameters()))
    assert not any(isinstance(part, torch.nn.Parameter) for part in copied)


@pytest.mark.usefixtures("adam_of_gpu")
@pytest.mark.parametrize("format", [FP32, BF16])
def test_reloaded_weights_are_those_of_the_next_step(groups: Any, format: GemmFormat) -> None:
    """Float32 decays among them, which core would go on to update from what they were before."""
    from hybrid_train.checkpoint.optimizer_state import set_step_count

    trained, whole = engine_of(groups, 0.5, format), engine_of(groups, 0, format)
    begun = weights_of(trained)
    assert take(trained, 2) == take(whole, 2)
    for engine in (trained, whole):
        for weight, value in zip(engine.network.chunks[0].parameters(), begun, strict=True):
            weight.data.copy_(value)
        engine.network.optimizer.reload_model_params()
        set_step_count(engine.network.optimizer, 7)
    assert take(trained, 3) == take(whole, 3)
    assert same(weights_of(trained), weights_of(whole))


@pytest.mark.usefixtures("adam_of_gpu")
@pytest.mark.parametrize("before", [0, 2], ids="after {} steps".format)
def test_a_step_that_is_taken_back_leaves_no_mark(groups: Any, before: int) -> None:
    engine, other = engine_of(groups, 0.5), engine_of(groups, 0.5)
    assert take(engine, before) == take(other, before)
    put_back = engine.network.snapshot()
    take(engine, 2, seed=5)
    put_back()
    assert take(engine, 3) == take(other, 3)
    assert same(weights_of(engine), weights_of(other))


def test_decay_and_rates_reach_both_memories(groups: Any) -> None:
    """Weights that do not decay differ from those that do, in host memory as elsewhere."""
    kinds = [ParameterKind.norms, ParameterKind.A_log]
    options = {"weight_decay": 0.5, "no_decay": kinds}
    engines = [engine_of(groups, share, **options) for share in (0, 0.5)]
    assert take(engines[0]) == take(engines[1])
    assert same(*map(weights_of, engines))
    assert not same(weights_of(engines[1]), weights_of_run(groups, weight_decay=0.0))


def weights_of_run(groups: Any, **options: Any) -> list[Tensor]:
    engine = engine_of(groups, 0.5, **options)
    take(engine)
    return weights_of(engine)


def test_cores_own_class_still_takes_no_float32_weight_beside_bfloat16_ones(groups: Any) -> None:
    """Where this fails, core has mended it: see what of ours can go."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    weight = torch.nn.Parameter(torch.ones(4))
    part = weight.view(-1)[:2]  # as DistributedOptimizer cuts it
    with pytest.raises(ValueError, match="non-leaf Tensor"):
        HybridDeviceOptimizer([{"params": [part]}], cpu_optimizer_cls=torch.optim.AdamW)


def test_a_cpu_runs_it_and_core_is_told(groups: Any) -> None:
    from hybrid_train.megatron import gpu_switches, optimizers

    job = engine_job(0.25)
    assert list(gpu_switches.left_out(job, on_gpu=False, fused=False)) == []
    config = optimizers._config(job.optimizer, job.parallel, torch.bfloat16)
    assert (config.optimizer_cpu_offload, config.optimizer_offload_fraction) == (True, 0.25)
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    plain = optimizers._config(AdamW(), job.parallel, torch.bfloat16)
    assert not plain.optimizer_cpu_offload
    assert not plain.use_precision_aware_optimizer
