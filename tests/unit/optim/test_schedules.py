"""The learning rate against closed forms and against Megatron's own scheduler."""

import math

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hybrid_train.optim.schedules import learning_rate
from hybrid_train.schema.optimizer import (
    Cosine,
    DecayShape,
    Schedule,
    Wsd,
)

# Megatron's scheduler logs through its own rank look-up.
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

TOTAL = 10_000
PEAK = 3e-4


def wsd(shape: DecayShape = DecayShape.linear, warmup: str = "1k", decay: str = "2k") -> Wsd:
    return Wsd(
        peak_lr=PEAK,
        warmup_tokens=warmup,
        decay_tokens=decay,
        decay_shape=shape,
        final_lr_ratio=0.01,
    )


def megatron_rates(schedule: Schedule, batch: int, steps: int) -> list[float]:
    """Rates of Megatron's scheduler before each of the given steps; it counts in tokens here."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=schedule.peak_lr,
        min_lr=getattr(schedule, "final_lr_ratio", 0.0) * schedule.peak_lr,
        lr_warmup_steps=1000 if schedule.warmup_tokens == "1k" else 0,
        lr_decay_steps=TOTAL,
        lr_decay_style={"wsd": "WSD"}.get(schedule.kind, schedule.kind),
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=TOTAL,
        wd_incr_style="constant",
        wsd_decay_steps=2000,
        lr_wsd_decay_style=schedule.decay_shape.value if isinstance(schedule, Wsd) else None,
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(batch)
    return rates


SCHEDULES = {
    "constant": Schedule(peak_lr=PEAK, warmup_tokens="1k"),
    "cosine": Cosine(peak_lr=PEAK, warmup_tokens="1k", final_lr_ratio=0.1),
    "cosine without warm-up": Cosine(peak_lr=PEAK),
    "no warm-up": wsd(warmup="0"),
    **{f"wsd {shape.value}": wsd(shape) for shape in DecayShape},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("batch", [125, 96], ids="batch={}".format)  # 96 divides no length
def test_rates_equal_those_of_megatron(schedule: Schedule, batch: int) -> None:
    steps = TOTAL // batch + 5  # some steps past the end
    ours = [learning_rate(schedule, step * batch, TOTAL) for step in range(steps)]
    # Same formula, other order of operations: a few units in the last place of the peak.
    assert ours == pytest.approx(megatron_rates(schedule, batch, steps), rel=1e-12, abs=1e-15)


def test_warm_up_starts_at_zero_and_reaches_the_peak_at_its_last_token() -> None:
    assert [learning_rate(wsd(), t, TOTAL) for t in (0, 250, 1000, 1001)] == [
        0.0,
        pytest.approx(PEAK / 4),
        PEAK,
        PEAK,
    ]


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        (DecayShape.linear, 3 / 4),
        (DecayShape.cosine, 0.5 * (1 + math.sqrt(0.5))),
        (DecayShape.exponential, 2 / 2**0.25 - 1),
        (DecayShape.minus_sqrt, 1 / 2),
    ],
)
def test_a_quarter_into_the_decay_each_shape_has_its_closed_form(
    shape: DecayShape, left: float
) -> None:
    rate = learning_rate(wsd(shape), 8500, TOTAL)
    assert rate == pytest.approx(PEAK * (0.01 + 0.99 * left), rel=1e-12)


@pytest.mark.parametrize("shape", DecayShape)
def test_every_shape_ends_at_the_final_rate_and_stays_there(shape: DecayShape) -> None:
    assert learning_rate(wsd(shape), TOTAL, TOTAL) == pytest.approx(0.01 * PEAK)
    assert learning_rate(wsd(shape), 2 * TOTAL, TOTAL) == pytest.approx(0.01 * PEAK)


def test_the_rate_never_rises_after_the_warm_up() -> None:
    for schedule in SCHEDULES.values():
        rates = [learning_rate(schedule, t, TOTAL) for t in range(1000, TOTAL + 500, 50)]
        assert rates == sorted(rates, reverse=True)


def test_warm_up_and_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="together exceed the 10000 tokens"):
        learning_rate(wsd(warmup="5k", decay="6k"), 9_000, TOTAL)
