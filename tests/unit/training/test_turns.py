"""Steps of several turns, by a small objective of two networks (`tests/training_objectives.py`)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.problems import UserError
from hybrid_train.training.bad_steps import BadSteps
from tests.tiny import (
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
)

if TYPE_CHECKING:
    from hybrid_train.training.engine import Engine

pytestmark = MEGATRON_WARNINGS
PATTERNS = {"first": "ME*E", "second": "E-"}


@dataclass(kw_only=True)
class TwoNetworks(NextToken):
    """Settings of an objective with two networks, as a package of a user's own has them."""

    implementation: ClassVar[str] = "tests.training_objectives:InTurns"

    kind: str = "two_networks"
    joined: bool = False  # whether the loss of the first network is that of both
    order: str = "first second"

    def models(self, model: Model) -> dict[str, Model]:
        return {name: replace(model, pattern=pattern) for name, pattern in PATTERNS.items()}


def two(groups: Any, *, joined: bool = False, order: str = "first second") -> "Engine":
    objective = TwoNetworks(moe_aux_loss_scale=0.1, joined=joined, order=order)
    job = tiny_job(PATTERNS["first"], objective=objective)
    job.model.vocab_size = VOCAB
    return tiny_engine(job, groups)


def one(groups: Any, name: str) -> "Engine":
    """The same network in a run of its own."""
    objective = NextToken(moe_aux_loss_scale=0.1)
    job = tiny_job(PATTERNS[name], objective=objective)
    job.train.seed += list(PATTERNS).index(name)  # networks of one run do not begin alike
    return tiny_engine(job, groups)


def weights(network: Any) -> dict[str, Tensor]:
    """Weights and persistent buffers, expert biases among them."""
    state = network.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def moments(network: Any) -> list[Tensor]:
    """Moments and step counts, parameter by parameter."""
    return [
        value.clone()
        for part in network.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]


def same(one: Any, other: Any) -> bool:
    pairs = zip(
        *(list(found.values()) if isinstance(found, dict) else found for found in (one, other)),
        strict=True,
    )
    return all(torch.equal(first, second) for first, second in pairs)


def everything(engine: "Engine") -> list[Any]:
    return [found(one) for one in engine.networks.values() for found in (weights, moments)]


def test_two_turns_are_two_runs_of_one_network_each(groups: Any) -> None:
    """Losses, balance losses, loads, rates and weights: nothing of one reaches the other."""
    all_or_none, apart = two(groups), [one(groups, name) for name in PATTERNS]
    both, first, second = (microbatches(some_rows(), 2) for _ in range(3))
    for _ in range(3):
        report = all_or_none.step(both, tokens_seen=0)
        left, right = (
            e.step(b, tokens_seen=0) for e, b in zip(apart, (first, second), strict=True)
        )
        assert (report.loss, report.grad_norm, report.lr) == (left.loss, left.grad_norm, left.lr)
        expected = dict(left.metrics)
        expected["term/second"] = right.loss
        numbers = {"lr": right.lr, "grad_norm": right.grad_norm, **right.metrics}
        expected |= {f"{name}/second": value for name, value in numbers.items()}
        assert report.metrics == expected
    for network, run in zip(all_or_none.networks.values(), apart, strict=True):
        assert same(weights(network), weights(run.network))
        assert same(moments(network), moments(run.network))


def test_every_metric_of_two_networks_has_a_name_and_a_unit(groups: Any) -> None:
    from hybrid_train.tracking.metrics import metric

    for name in two(groups).step(microbatches(some_rows(), 2), tokens_seen=0).metrics:
        assert metric(name).meaning


def test_a_network_out_of_turn_gets_gradients_through_it_but_none_of_its_own(groups: Any) -> None:
    """The first learns from the loss of both; the second is asked, and stays as it is."""
    engine = two(groups, joined=True, order="first")
    second, first = engine.networks["second"], engine.networks["first"]
    alone = two(groups, joined=False, order="first")
    before = [weights(second), moments(second)]
    rows = some_rows()
    engine.step(microbatches(rows, 2), tokens_seen=0)
    alone.step(microbatches(rows, 2), tokens_seen=0)
    assert same(weights(second), before[0])
    assert same(moments(second), before[1])
    for name, parameter in second.chunks[0].named_parameters():
        assert not parameter.main_grad.any(), name
        assert parameter.requires_grad, name
    assert second.chunks[0].training
    assert second.balance_losses.take() is None
    # What came through the second network is in the gradient of the first.
    assert not same(weights(first), weights(alone.networks["first"]))


def test_passes_of_a_network_out_of_turn_leave_no_mark_on_its_next_update(groups: Any) -> None:
    asked, left_alone = (two(groups, joined=joined) for joined in (True, False))
    rows = microbatches(some_rows(), 2)
    listed = [next(rows), next(rows)]
    start = weights(asked.networks["second"])
    reports = [engine.step(iter(listed), tokens_seen=0) for engine in (asked, left_alone)]
    after = [weights(engine.networks["second"]) for engine in (asked, left_alone)]
    assert same(*after)
    for name in ("term/second", "expert_load_1/second", "moe_aux_loss/second"):
        assert reports[0].metrics[name] == reports[1].metrics[name]
    assert not same(after[0], start)


def spoil_gradient(engine: "Engine", name: str) -> None:
    """Let the gradient of a network be infinite, after its reduction."""
    network = engine.networks[name]
    reduce = network.finalizer

    def spoiled(chunks: Any, *args: Any, **kwargs: Any) -> None:
        reduce(chunks, *args, **kwargs)
        next(iter(chunks[0].parameters())).main_grad.view(-1)[0] = float("inf")

    network.chunks[0].config.finalize_model_grads_func = spoiled


@pytest.mark.parametrize("bad", PATTERNS)
def test_a_step_with_a_bad_turn_leaves_all_networks_as_before(groups: Any, bad: str) -> None:
    engine, batches = two(groups), microbatches(some_rows(), 2)
    engine.step(batches, tokens_seen=0)  # moments are not zero then
    before = everything(engine)
    spoil_gradient(engine, bad)
    report = engine.step(batches, tokens_seen=0, bad_steps=BadSteps(Recovery(skip_nonfinite=True)))
    assert report.skipped_kind == "nonfinite"
    assert "the gradient norm is inf" in report.skipped
    assert all(same(*pair) for pair in zip(before, everything(engine), strict=True))


def test_after_a_bad_first_step_the_next_is_a_first_one(groups: Any) -> None:
    """The optimizer makes its state at the first update, which was taken back."""
    engine, fresh = two(groups), two(groups)
    reduce = engine.networks["second"].finalizer
    spoil_gradient(engine, "second")
    skipping = BadSteps(Recovery(skip_nonfinite=True))
    engine.step(microbatches(some_rows(), 2), tokens_seen=0, bad_steps=skipping)
    engine.networks["second"].chunks[0].config.finalize_model_grads_func = reduce
    for one_engine in (engine, fresh):
        one_engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    assert all(same(*pair) for pair in zip(everything(engine), everything(fresh), strict=True))


def test_networks_of_one_shape_do_not_begin_alike(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATTERNS, "second", PATTERNS["first"])
    first, second = (weights(network) for network in two(groups).networks.values())
    name = next(name for name in first if "router.weight" in name)
    assert not torch.equal(first[name], second[name])


def test_a_checkpoint_of_two_networks_restores_both(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import layout, store
    from hybrid_train.checkpoint.tensor_files import StoredTensors
    from hybrid_train.training.hooks.checkpointing import content_of

    saved, batches = two(groups), microbatches(some_rows(), 2)
    saved.step(batches, tokens_seen=0)
    folder = store.save(tmp_path, content_of(saved), {"step": 1}, keep=1)
    with StoredTensors(folder) as stored:
        names = set(stored.names)
    assert {f"{name}/embedding.word_embeddings.weight" for name in PATTERNS} <= names
    assert {f"optimizer.step.{name}" for name in PATTERNS} <= names
    loaded = two(groups)
    assert not same(weights(loaded.networks["second"]), weights(saved.networks["second"]))
    store.load(layout.locate(folder), content_of(loaded))
    assert all(same(*pair) for pair in zip(everything(saved), everything(loaded), strict=True))
    reports = [engine.step(batches, tokens_seen=0) for engine in (saved, loaded)]
    assert reports[0].metrics == reports[1].metrics


def test_weights_of_two_networks_are_a_start_without_moments(groups: Any, tmp_path: Path) -> None:
    from hybrid_train.checkpoint import store
    from hybrid_train.training.hooks.checkpointing import content_of, load_weights

    saved = two(groups)
    saved.step(microbatches(some_rows(), 2), tokens_seen=0)
    folder = store.save(tmp_path, content_of(saved), {"step": 1}, keep=1)
    begun = two(groups)
    load_weights(folder, begun)
    for name, network in begun.networks.items():
        assert same(weights(network), weights(saved.networks[name]))
        assert not any(moment.any() for moment in moments(network))


def test_an_objective_prepares_its_batches_before_the_turns(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reversed_rows = two(groups), some_rows().flip(1)
    monkeypatch.setattr(
        engine.objective, "prepare", lambda batches: [batch_of(reversed_rows)], raising=True
    )
    expected = two(groups).step(iter([batch_of(reversed_rows)] * 2), tokens_seen=0)
    report = engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_turn_of_a_network_that_is_not_there_is_refused_by_name(groups: Any) -> None:
    with pytest.raises(UserError, match=r"it trains third, but its networks are first, second"):
        two(groups, order="first third")
