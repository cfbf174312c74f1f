"""Hidden states drawn to a teacher's: the loss, its gradients, and what becomes of its weight.

Layouts are compared in tests/parity.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hybrid_train.schema.objective import HiddenLoss, HiddenStates
from tests.distilled import student_job, write_teacher
from tests.tiny import MEGATRON_WARNINGS, batch_of, some_rows, tiny_engine

pytestmark = MEGATRON_WARNINGS
PAIRS = {1: 2, 3: 3}
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def teacher(groups: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("wide"), groups, seed=7, hidden_size=48)


def engine_of(groups: Any, teacher: Path, **settings: Any) -> Any:
    job = student_job(
        teacher, hidden=HiddenStates(layers=[*PAIRS], teacher_layers=[*PAIRS.values()], **settings)
    )
    job.train.microbatch = len(some_rows())
    return tiny_engine(job, groups)


def batch() -> Any:
    rows = some_rows()
    mask = torch.ones(rows.shape[0], rows.shape[1] - 1)
    mask[0, :5] = 0.0
    return batch_of(rows, mask)


def states_of(network: Any, numbers: Any, batch: Any) -> dict[int, Tensor]:
    """What layers hand on, [S, B, H], with gradients where the network has some."""
    found: dict[int, Tensor] = {}
    model = next(one for one in network.chunks[0].modules() if hasattr(one, "decoder"))
    handles = [
        layer.register_forward_hook(
            lambda _, __, output, number=int(layer.layer_number): found.__setitem__(
                number, output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in model.decoder.layers
        if int(layer.layer_number) in numbers
    ]
    model(batch.tokens, read=lambda outputs: outputs.hidden)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", HiddenLoss)
def test_the_loss_and_its_gradients_are_those_of_its_formula(
    kind: HiddenLoss, groups: Any, teacher: Path
) -> None:
    from hybrid_train.megatron import data_parallel

    given = batch()
    gradients = {}
    for weight in (0.0, 0.5):
        engine = engine_of(groups, teacher, kind=kind, weight=weight)
        report = engine.step(iter([given]), tokens_seen=0)
        gradients[weight] = gradients_of(engine)
    engine = engine_of(groups, teacher, kind=kind, weight=0.5)
    (theirs,) = (one.network for one in engine.objective._teachers)
    with torch.no_grad():
        targets = states_of(theirs, PAIRS.values(), given)
    model = engine.network.chunks[0].module
    data_parallel.zero_gradients(engine.network.chunks)
    own = states_of(engine.network, PAIRS, given)
    total, weights = torch.zeros(()), given.loss_weights.t()
    for number, states in own.items():
        projected = states @ model.hidden_projections[str(number)].weight.t()
        target = targets[PAIRS[number]]
        if kind is HiddenLoss.mse:
            apart = (projected - target).square().mean(-1)
        else:
            apart = 1 - cosine_similarity(projected, target, dim=-1)
        total = total + (apart * weights).sum() / weights.sum() / len(PAIRS)
    assert report.metrics["hidden_loss"] == pytest.approx(float(total.detach()), rel=64 * EPSILON)
    (0.5 * total).backward()
    for name, wanted in gradients_of(engine).items():
        found = gradients[0.5][name] - gradients[0.0][name]
        # A difference of two gradients has the rounding of these.
        scale = max(float(one[name].abs().max()) for one in gradients.values())
        assert (found - wanted).abs().max() <= 64 * EPSILON * max(scale, 1e-3), name
    assert gradients[0.5]["hidden_projections.1.weight"].abs().max() > 0


def gradients_of(engine: Any) -> dict[str, Tensor]:
    return {
        name: one.main_grad.clone()
        for name, one in engine.network.chunks[0].module.named_parameters()
    }


def test_without_a_weight_of_its_own_it_counts_as_much_as_the_divergence(
    groups: Any, teacher: Path
) -> None:
    engine = engine_of(groups, teacher)
    assert engine.objective.state_dict() == {"hidden_weight": 0.0}  # nothing is known yet
    report = engine.step(iter([batch()]), tokens_seen=0)
    weight = report.metrics["divergence"] / report.metrics["hidden_loss"]
    assert engine.objective.state_dict() == {"hidden_weight": weight}
    other = engine_of(groups, teacher)
    other.objective.load_state_dict({"hidden_weight": weight})
    assert other.objective.state_dict() == engine.objective.state_dict()


def test_a_validation_reports_it_and_leaves_no_trace(groups: Any, teacher: Path) -> None:
    engine = engine_of(groups, teacher, weight=0.5)
    found = engine.evaluate([batch()])
    report = engine.step(iter([batch()]), tokens_seen=0)
    assert found["hidden_loss"] == pytest.approx(report.metrics["hidden_loss"], rel=1e-6)
