"""Megatron's optimizer, as the engine sets it up, against torch.optim.AdamW."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.optimizer import Wsd
from hybrid_train.schema.parallel import Parallel
from tests.tiny import LENGTH, MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
EPSILON = torch.finfo(torch.float32).eps
PEAK, STEPS = 1e-2, 3
WARMUP = 8 * LENGTH  # two steps: every step has a rate of its own
CLIP = 0.5  # far below the norms that occur, so that clipping shows


def job_of(parallel: Parallel) -> Any:
    schedule = Wsd(peak_lr=PEAK, warmup_tokens=str(WARMUP), decay_tokens="0")
    job = tiny_job("MEM*M-/*E", parallel=parallel, schedule=schedule)
    job.optimizer.clip_grad_norm = CLIP
    job.optimizer.weight_decay = 0.3
    return job


def decays(name: str) -> bool:
    """Matrices decay, the taps of the convolution among them; what has one axis does not."""
    last = name.split(".")[-1]
    return (last.rstrip("0123456789") == "weight" and "norm" not in name) or last == "conv1d_weight"


@pytest.mark.parametrize("split", [True, False], ids="distributed_optimizer={}".format)
def test_steps_are_those_of_torch_adamw(groups: Any, split: bool) -> None:
    job = job_of(Parallel(distributed_optimizer=split))
    engine = tiny_engine(job, groups)
    ours = dict(engine.network.chunks[0].module.named_parameters())
    theirs = {name: weight.detach().clone() for name, weight in ours.items()}
    adamw = job.optimizer
    twin = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.items() if decays(n)], "weight_decay": 0.3},
            {"params": [p for n, p in theirs.items() if not decays(n)], "weight_decay": 0.0},
        ],
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
    )
    gradients: dict[str, Tensor] = {}
    take_step = engine.network.optimizer.step

    def listen() -> Any:
        gradients.update({name: weight.main_grad.clone() for name, weight in ours.items()})
        return take_step()

    engine.network.optimizer.step = listen
    for step in range(STEPS):
        rate = PEAK * min(step / 2, 1.0)
        report = engine.step(microbatches(some_rows(), 2), tokens_seen=4 * LENGTH * step)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert report.grad_norm == pytest.approx(norm, rel=1e-6)
        assert norm > CLIP
        for name, weight in theirs.items():
            weight.grad = gradients[name] * (CLIP / (norm + 1e-6))  # as torch's clip_grad_norm_
        for group in twin.param_groups:
            group["lr"] = rate
        twin.step()
        for name, weight in theirs.items():
            # The same formula; a few roundings of a value, and those of an update of at most the
            # rate times 1 / sqrt(1 - beta2), step after step.
            atol = (step + 1) * (4 * EPSILON * weight.abs().max().item() + 64 * EPSILON * rate)
            torch.testing.assert_close(
                ours[name].detach(),
                weight,
                rtol=0,
                atol=atol,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def test_splitting_the_state_changes_nothing(groups: Any) -> None:
    runs = []
    for split in (True, False):
        engine = tiny_engine(job_of(Parallel(distributed_optimizer=split)), groups)
        batches = microbatches(some_rows(), 2)
        reports = [engine.step(batches, tokens_seen=WARMUP) for _ in range(STEPS)]
        runs.append((reports, dict(engine.network.chunks[0].module.named_parameters())))
    (split_reports, split_weights), (reports, weights) = runs
    for one, other in zip(split_reports, reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=32 * EPSILON)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=32 * EPSILON)
    for name, weight in weights.items():
        # Norms summed in another order scale all gradients by 1 + a few ulps, and Adam's update is
        # independent of the scale but for eps. From the second step on an element whose gradient
        # is hardly more than rounding may go its own way; there are few, so the mean is compared.
        off = (split_weights[name] - weight).abs().mean()
        limit = 32 * EPSILON * STEPS * PEAK + 4 * EPSILON * weight.abs().mean()
        assert off <= limit, name


def test_only_what_has_several_axes_decays(groups: Any) -> None:
    engine = tiny_engine(job_of(Parallel()), groups)
    named = dict(engine.network.chunks[0].module.named_parameters())
    assert {name for name in named if decays(name)} == {
        name for name, weight in named.items() if weight.dim() > 1 and not name.endswith("bias")
    }
    assert any("conv1d_weight" in name for name in named if decays(name))
    for kept in ("A_log", "dt_bias", ".D", "norm.weight", "layer_norm_weight", "conv1d_bias"):
        assert any(name.endswith(kept) for name in named if not decays(name)), kept


def test_a_bad_norm_is_reported_before_anything_changes(groups: Any) -> None:
    from hybrid_train.megatron.optimizers import build_optimizer

    engine = tiny_engine(tiny_job("-"), groups)
    seen: list[float] = []

    def stop(norm: float) -> None:
        seen.append(norm)
        raise ArithmeticError

    job = tiny_job("-")
    optimizer = build_optimizer(
        job.optimizer, job.parallel, engine.network.chunks, torch.float32, stop
    )
    weights = list(engine.network.chunks[0].module.parameters())
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.main_grad.fill_(float("inf"))
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert seen == [float("inf")]
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
