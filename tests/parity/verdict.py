"""Whether a case agrees with one process, within what the order of float32 sums can do.

Where a tolerance comes from. Every layout adds the same float32 terms in another order. Rounding a
sum of K terms is a walk of K steps of half an ulp, sqrt(K) / 2 ulps; through L products one after
the other the walks add up likewise, sqrt(L * K) / 2.

- Losses: means over the tokens of a step of what went through two sums in each layer, of at most
  168 terms; the mean averages the errors of single tokens out, so the bound of one token is one for
  all. With the 12 layers of the parity model: sqrt(24 * 168) / 2, about 32 ulps.
- Gradients: forward and backward, again two sums in each layer; the longest is that of a decay rate
  (A_log), over tokens x channels x states of a head. With the 128 x 8 x 8 of the parity model:
  sqrt(24 * 8192) / 2, about 220 ulps. The largest found there is 60.
- Weights after three steps: Adam's update is the rate times a quotient that inherits the gradient's
  error, some 1e-5 of the rate; but an element whose gradient is nothing but rounding may go
  anywhere within its three steps. A hundredth of the way that all elements can go leaves room for
  one such element in ten thousand, and none for a tensor that goes elsewhere.

A gradient counted twice is off by 8 million ulps. Copies of one weight on several ranks must agree
to the bit: they may never drift apart.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybrid_train.schema.pattern import parse
from hybrid_train.schema.train import TrainJob
from tests.parity.case import RATE
from tests.parity.measure import EPSILON, Outcome

LONGEST_ROW = 168  # columns of in_proj: 2 x 64 channels, 2 x 4 groups x 8 states, 8 heads, halved
WEIGHT_WAY = 0.01 * RATE  # of each step


@dataclass(frozen=True)
class Verdict:
    """The largest deviations of a case, and in words what is beyond its tolerance."""

    loss: float
    grad_norm: float
    number_ulps: float
    gradient_ulps: float
    worst_gradient: str
    weight_way: float  # share of the way that weights can go in the steps taken
    problems: list[str]


def number_ulps(job: TrainJob) -> float:
    """Return how far losses and norms may be off."""
    return math.sqrt(_sums(job) * LONGEST_ROW) / 2


def gradient_ulps(job: TrainJob) -> float:
    """Return how far gradients may be off."""
    tokens, mamba = job.train.global_batch * job.train.sequence_length, job.model.mamba
    return math.sqrt(_sums(job) * tokens * mamba.head_dim * mamba.state_size) / 2


def _sums(job: TrainJob) -> int:
    return 2 * len(parse(job.model.pattern).layers)


def judge(
    outcomes: Sequence[Outcome], reference: Sequence[dict[str, float]], job: TrainJob
) -> Verdict:
    """Compare what every rank computed with the numbers of one process."""
    gradients = _largest(outcome.gradients for outcome in outcomes)
    weights = _largest(outcome.weights for outcome in outcomes)
    numbers = {
        f"{name} of step {step + 1}": _ulps(found[name], expected[name])
        for outcome in outcomes
        for step, (found, expected) in enumerate(zip(outcome.reports, reference, strict=True))
        for name in expected
    }
    problems = [
        *_beyond(numbers, number_ulps(job), "ulps"),
        *_beyond({f"gradient of {k}": v for k, v in gradients.items()}, gradient_ulps(job), "ulps"),
        *_beyond(
            {f"weight {k}": v for k, v in weights.items()},
            WEIGHT_WAY * len(reference),
            "(root mean square)",
        ),
        *_drifted(outcomes),
    ]
    if any(outcome.reports != outcomes[0].reports for outcome in outcomes):
        problems.append("ranks report different numbers")
    worst = max(gradients, key=gradients.__getitem__)
    first = outcomes[0].reports[0]
    return Verdict(
        loss=first["loss"],
        grad_norm=first["grad_norm"],
        number_ulps=max(numbers.values()),
        gradient_ulps=gradients[worst],
        worst_gradient=worst,
        weight_way=max(weights.values()) / (len(reference) * RATE),
        problems=problems,
    )


def _ulps(found: float, expected: float) -> float:
    return abs(found - expected) / (EPSILON * abs(expected)) if found != expected else 0.0


def _largest(deviations: Iterator[dict[str, float]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for of_rank in deviations:
        for key, value in of_rank.items():
            largest[key] = max(largest.get(key, 0.0), value)
    return largest


def _beyond(deviations: dict[str, float], tolerance: float, unit: str) -> Iterator[str]:
    for name, value in sorted(deviations.items(), key=lambda item: -item[1]):
        if not value <= tolerance:  # NaN is beyond, too
            yield f"{name} is off by {value:.3g} {unit}; {tolerance:.3g} are allowed"


def _drifted(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the weights of which two ranks hold different copies of one part."""
    seen: dict[str, str] = {}
    drifted = set()
    for outcome in outcomes:
        for part, digest in outcome.copies.items():
            if seen.setdefault(part, digest) != digest:
                drifted.add(part)
    for part in sorted(drifted):
        yield f"ranks hold different copies of {part}"
