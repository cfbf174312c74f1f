"""One optimizer step against sums done by hand."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.schema.model import Mtp
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.optimizer import Schedule, Wsd
from hybrid_train.training.bad_steps import BadSteps
from tests.packed import documents, packed_batch
from tests.sampled import sampled
from tests.tiny import (
    BATCH,
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    losses_of,
    microbatches,
    some_rows,
    tiny_engine,
    tiny_job,
    tiny_model,
)

if TYPE_CHECKING:
    from hybrid_train.training.engine import Engine

pytestmark = MEGATRON_WARNINGS
RATE = 1e-3
EPSILON = torch.finfo(torch.float32).eps


def engine_of(groups: Any, pattern: str, **sections: Any) -> "Engine":
    return tiny_engine(tiny_job(pattern, **sections), groups)


def state_of(engine: "Engine") -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    state = engine.network.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def uneven_mask() -> Tensor:
    """Sequences with 16, 9, 0 and 1 labels that count."""
    mask = torch.zeros(BATCH, LENGTH)
    mask[0] = 1
    mask[1, 3:12] = 1
    mask[3, -1] = 1
    return mask


@pytest.mark.parametrize("small", sampled([1, 2], 1), ids="microbatch={}".format)
def test_smaller_microbatches_take_the_step_of_one_of_four(groups: Any, small: int) -> None:
    rows, mask = some_rows(), uneven_mask()
    runs = []
    for size in (4, small):
        job = tiny_job()
        job.train.microbatch = size
        job.objective.moe_aux_loss_scale = 0.1  # large enough to be seen in the gradient
        engine = tiny_engine(job, groups)
        batches = microbatches(rows, size, mask)
        reports = [engine.step(batches, tokens_seen=0) for _ in range(3)]
        runs.append((reports, state_of(engine)))
    (whole, whole_state), (parts, part_state) = runs
    for one, other in zip(whole, parts, strict=True):
        # Sums of at most 64 losses, whose order differs: 64 half ulps.
        assert other.loss == pytest.approx(one.loss, rel=32 * EPSILON)
        assert other.metrics == pytest.approx(one.metrics, rel=32 * EPSILON)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=32 * EPSILON)
    # Adam's update is rate * (gradient / its own size), so it inherits the relative error of the
    # gradient: 32 ulps of 3 steps of the rate. An element whose gradient is nothing but rounding
    # may go anywhere within its 3 steps; there are few, so the mean is compared.
    for name, value in whole_state.items():
        off = (part_state[name] - value).abs().mean()
        assert off <= 3 * RATE * 32 * EPSILON, name


def packed_step(
    groups: Any, rows: list[Any], length: int, size: int, aux: float, prompt: int = 0
) -> Any:
    """The report of a step on rows of documents; the first labels of each row do not count."""
    job = tiny_job()
    job.train.sequence_length, job.train.microbatch = length, size
    job.train.global_batch = len(rows)
    job.objective.moe_aux_loss_scale = aux
    batches = [packed_batch(rows[n : n + size], length) for n in range(0, len(rows), size)]
    for batch in batches:
        batch.loss_weights[:, :prompt] = 0
    return tiny_engine(job, groups).step(iter(batches), tokens_seen=0)


def test_routers_count_a_prompt_as_any_other_text(groups: Any) -> None:
    rows = [documents(*row) for row in [(5, 1, 7), (16,), (12,), (9, 4)]]
    whole, masked = (packed_step(groups, rows, LENGTH, 2, 0.1, prompt) for prompt in (0, 8))
    assert masked.loss != whole.loss
    assert len(whole.metrics) > 3
    for name in whole.metrics:
        if name == "moe_aux_loss" or name.startswith("expert_load"):
            assert masked.metrics[name] == whole.metrics[name], name


def test_smaller_microbatches_take_the_step_of_one_with_padded_rows_too(groups: Any) -> None:
    rows = [documents(*row) for row in [(5, 1, 7), (16,), (2,), (9, 4)]]
    whole, *parts = (packed_step(groups, rows, LENGTH, size, aux=0.1) for size in (4, 2, 1))
    for part in parts:
        assert part.loss == pytest.approx(whole.loss, rel=32 * EPSILON)
        assert part.grad_norm == pytest.approx(whole.grad_norm, rel=32 * EPSILON)


def test_a_step_on_packed_rows_is_that_on_their_documents(groups: Any) -> None:
    """But for the balance loss, which is of rows."""
    short = documents(8, 8, 8, 8, 8, 8, 8, 8)
    apart = packed_step(groups, [[document] for document in short], 8, 2, aux=0.0)
    all_or_none = packed_step(groups, [short[n : n + 2] for n in range(0, 8, 2)], 16, 2, aux=0.0)
    filled_up = packed_step(groups, [short[:4], short[4:7], short[7:]], 40, 3, aux=0.0)
    for packed in (all_or_none, filled_up):
        assert packed.loss == pytest.approx(apart.loss, rel=32 * EPSILON)
        assert packed.grad_norm == pytest.approx(apart.grad_norm, rel=32 * EPSILON)
        loads = [name for name in apart.metrics if name != "moe_aux_loss"]
        assert len(loads) > 2
        for name in loads:
            assert packed.metrics[name] == pytest.approx(apart.metrics[name], rel=32 * EPSILON)


def test_loss_is_the_mean_over_the_labels_that_count(groups: Any) -> None:
    engine = engine_of(groups, "M*-")
    rows, mask = some_rows(), uneven_mask()
    with torch.no_grad():
        logits = engine.network.chunks[0].module(rows[:, :-1]).logits()[..., :VOCAB]
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum() / mask.sum()
    report = engine.step(microbatches(rows, 2, mask), tokens_seen=0)
    assert report.loss == pytest.approx(expected.item(), rel=32 * EPSILON)


def test_gradient_norm_is_that_of_the_mean_loss(groups: Any) -> None:
    engine = engine_of(groups, "M*-")
    # A twin without gradient buffers: linear layers add to these and return no gradient.
    model = tiny_model(tiny_job("M*-"), groups)
    rows, mask = some_rows(), uneven_mask()
    total, _ = losses_of(model, batch_of(rows, mask))
    weights = list(model.parameters())
    gradients = torch.autograd.grad(total / mask.sum(), weights)
    expected = torch.stack([gradient.norm() for gradient in gradients]).norm()
    report = engine.step(microbatches(rows, 2, mask), tokens_seen=0)
    assert report.grad_norm == pytest.approx(expected.item(), rel=32 * EPSILON)


# Of the second the sum over the whole step is less than one token.
@pytest.mark.parametrize("values", [(0.5, 2.0, 0.0, 0.3), (0.004, 0.01, 0.0, 0.002)], ids=str)
def test_labels_count_by_their_float_weights(groups: Any, values: tuple[float, ...]) -> None:
    """Loss and every gradient, of both depths, against autograd on the weighted mean."""
    job = tiny_job("M*-/*", objective=NextToken(mtp_loss_scale=0.7))
    job.optimizer.clip_grad_norm = 0.0  # which scales the gradient in place
    engine, model = tiny_engine(job, groups), tiny_model(job, groups)
    rows = some_rows()
    weights = torch.tensor(values)[torch.randint(len(values), (BATCH, LENGTH))]
    batch = batch_of(rows)
    outputs = model(batch.tokens, batch.position_ids)
    main, mtp = (
        F.cross_entropy(
            outputs.head.logits(hidden)[..., :VOCAB].transpose(1, 2), labels, reduction="none"
        )
        for hidden, labels in (
            (outputs.hidden, batch.labels),
            (outputs.mtp_hidden[0], F.pad(batch.labels[:, 1:], (0, 1))),
        )
    )
    shifted = F.pad(weights[:, 1:], (0, 1))  # the last label has no successor
    loss = (main * weights).sum() / weights.sum()
    mtp_loss = (mtp * shifted).sum() / shifted.sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss + 0.7 * mtp_loss, parameters)
    report = engine.step(microbatches(rows, 2, weights), tokens_seen=0)
    assert report.loss == pytest.approx(loss.item(), rel=32 * EPSILON)
    assert report.metrics["mtp_loss_1"] == pytest.approx(mtp_loss.item(), rel=32 * EPSILON)
    found = dict(engine.network.chunks[0].module.named_parameters())
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name].main_grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_is_a_mean_over_tokens_whatever_their_weight(groups: Any) -> None:
    gradients, losses = [], []
    for weight in (1.0, 0.25):
        job = tiny_job("ME", objective=NextToken(moe_aux_loss_scale=1.0))
        job.optimizer.clip_grad_norm = 0.0
        engine, rows = tiny_engine(job, groups), some_rows()
        weights = torch.full(rows[:, 1:].shape, weight)
        report = engine.step(microbatches(rows, 2, weights), tokens_seen=0)
        (router,) = routers_of(engine)
        gradients.append(router.weight.main_grad.clone())
        losses.append(report.metrics["moe_aux_loss"])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert losses[0] == losses[1]


def test_rate_of_a_step_is_that_of_the_tokens_seen_before_it(groups: Any) -> None:
    schedule = Wsd(peak_lr=RATE, warmup_tokens="1000", decay_tokens="1000", final_lr_ratio=0.0)
    engine = engine_of(groups, "-", schedule=schedule)
    batches = microbatches(some_rows(), 2)
    before = state_of(engine)
    assert engine.step(batches, tokens_seen=0).lr == 0
    assert all(torch.equal(value, before[name]) for name, value in state_of(engine).items())
    assert engine.step(batches, tokens_seen=500).lr == RATE / 2
    moved = (state_of(engine)["output_layer.weight"] - before["output_layer.weight"]).abs().max()
    assert (
        0 < moved <= 2 * RATE
    )  # Adam moves by the rate or less, 1 / sqrt(1 - beta2) at the very most
    assert engine.step(batches, tokens_seen=1_000_000).lr == 0


def routers_of(engine: "Engine") -> list[Any]:
    modules = engine.network.chunks[0].module.modules()
    return [module for module in modules if type(module).__name__ == "TopKRouter"]


def direct_routing(hidden: Tensor, router: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """Tokens per expert, and the balance loss averaged over sequences, of hidden [S, B, H].

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20: experts * sum over experts of (share of
    choices) * (mean of normalised scores), for each sequence by itself.
    """
    scores = torch.sigmoid(hidden.float() @ router.weight.float().T)  # [S, B, experts]
    chosen = (scores + router.expert_bias).topk(top_k, dim=-1).indices
    taken = F.one_hot(chosen, scores.shape[-1]).sum(dim=2).float()
    normalised = scores / scores.sum(dim=-1, keepdim=True)
    shares = taken.mean(dim=0) / top_k
    losses = scores.shape[-1] * (shares * normalised.mean(dim=0)).sum(dim=-1)
    return taken.sum(dim=(0, 1)), losses.mean()


@pytest.mark.parametrize("repeated", [True, False], ids="repeated={}".format)
def test_expert_loads_and_balance_loss_are_those_of_the_routing(
    groups: Any, repeated: bool
) -> None:
    job = tiny_job("EM*E/*E/*E")
    job.model.mtp = Mtp(repeated_block=repeated)
    engine = tiny_engine(job, groups)
    loads: dict[tuple[bool, int], Tensor] = {}
    losses = []

    def listen(router: Any, inputs: tuple[Tensor, ...], _: object) -> None:
        with torch.no_grad():
            taken, loss = direct_routing(inputs[0], router, job.model.moe.top_k)
        place = (router.is_mtp_layer, router.layer_number)
        loads[place] = loads.get(place, torch.zeros(())) + taken
        losses.append(loss)

    for router in routers_of(engine):
        router.register_forward_hook(listen)
    metrics = engine.step(microbatches(some_rows(), 2), tokens_seen=0).metrics
    ratios = {place: (load.max() / load.mean()).item() for place, load in loads.items()}
    assert metrics["expert_load_1"] == pytest.approx(ratios[False, 1])
    assert metrics["expert_load_4"] == pytest.approx(ratios[False, 4])
    assert metrics["expert_load_mtp_2"] == pytest.approx(ratios[True, 2])
    first, fourth, *mtp = torch.stack(losses).view(2, 4).mean(dim=0)  # 2 microbatches of 4 runs
    layers = [first, fourth, torch.stack(mtp).mean()] if repeated else [first, fourth, *mtp]
    # Means of means: as many roundings as there are tokens in a sequence.
    expected = torch.stack(layers).mean().item()
    assert metrics["moe_aux_loss"] == pytest.approx(expected, rel=LENGTH * EPSILON)


def test_weight_of_the_balance_loss_reaches_the_gradient_of_the_router(groups: Any) -> None:
    """The gradient is linear in the weight: its slope is the gradient of the balance loss."""
    rows = some_rows()
    gradients = []
    for weight in (1e-4, 1.0):
        job = tiny_job("E", objective=NextToken(moe_aux_loss_scale=weight))
        job.optimizer.clip_grad_norm = 0.0  # which scales the gradient in place
        engine = tiny_engine(job, groups)
        (router,) = routers_of(engine)
        seen: list[Tensor] = []
        handle = router.register_forward_hook(
            lambda _, x, __, seen=seen: seen.append(x[0].detach())
        )
        engine.step(microbatches(rows, 4), tokens_seen=0)
        handle.remove()
        gradients.append(router.weight.main_grad.clone())
    leaf = tiny_engine(tiny_job("E"), groups)
    (fresh,) = routers_of(leaf)
    loss = direct_routing(seen[0], fresh, 2)[1]
    (expected,) = torch.autograd.grad(loss, [fresh.weight])
    slope = (gradients[1] - gradients[0]) / (1.0 - 1e-4)
    # Sums over the tokens of the step, whose largest terms are those of the larger gradient.
    size = BATCH * LENGTH * EPSILON * gradients[1].abs().max().item()
    torch.testing.assert_close(slope, expected, rtol=0, atol=size)


def test_validation_changes_nothing_and_returns_masked_means(groups: Any) -> None:
    rows, mask = some_rows(), uneven_mask()
    plain, with_validation = engine_of(groups, "ME*E/*E"), engine_of(groups, "ME*E/*E")
    batches, others = microbatches(rows, 2), microbatches(rows, 2)
    plain.step(batches, tokens_seen=0)
    with_validation.step(others, tokens_seen=0)
    model = with_validation.network.chunks[0].module
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = state_of(with_validation)
    found = with_validation.evaluate([batch_of(rows[i : i + 2], mask[i : i + 2]) for i in (0, 2)])

    assert all(
        torch.equal(value, before[name]) for name, value in state_of(with_validation).items()
    )
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert model.training
    with torch.no_grad():
        _, losses = losses_of(model, batch_of(rows))
    shifted = F.pad(mask[:, 1:], (0, 1))  # the last label has no successor
    assert found["loss"] == pytest.approx((losses[0] * mask).sum().item() / mask.sum().item())
    expected = (losses[1] * shifted).sum().item() / shifted.sum().item()
    assert found["mtp_loss_1"] == pytest.approx(expected)
    one, other = plain.step(batches, tokens_seen=0), with_validation.step(others, tokens_seen=0)
    assert (other.loss, other.grad_norm, other.metrics) == (one.loss, one.grad_norm, one.metrics)


def test_a_step_can_be_repeated_to_the_bit(groups: Any) -> None:
    runs = []
    for _ in range(2):
        engine = engine_of(groups, "MEM*M-/*E/*E", schedule=Schedule(peak_lr=RATE))
        batches = microbatches(some_rows(), 2)
        reports = [engine.step(batches, tokens_seen=0) for _ in range(2)]
        runs.append(([(r.loss, r.grad_norm, r.metrics) for r in reports], state_of(engine)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_tied_embeddings_get_the_gradients_of_both_their_uses(groups: Any) -> None:
    job = tiny_job("M-")
    job.model.tie_embeddings = True
    job.optimizer.clip_grad_norm = 0.0
    rows = some_rows()
    plain = tiny_model(job, groups)  # without gradient buffers: the gradients are autograd's own
    batch = batch_of(rows)
    total, losses = losses_of(plain, batch)
    (total / losses.numel()).backward()
    engine = tiny_engine(job, groups)
    engine.step(microbatches(rows, BATCH), tokens_seen=0)
    name = "embedding.word_embeddings.weight"
    tied = engine.network.chunks[0].module.get_parameter(name)
    torch.testing.assert_close(tied.main_grad, plain.get_parameter(name).grad)


def test_an_mtp_depth_without_labels_has_no_loss_and_changes_nothing(groups: Any) -> None:
    """Documents of two tokens, as packing may leave them: depth 1 has nothing to predict."""
    mask = torch.zeros(BATCH, LENGTH)
    mask[:, 0] = 1
    engine = engine_of(groups, "M-/*E", objective=NextToken(moe_aux_loss_scale=0.0))
    report = engine.step(microbatches(some_rows(), 2, mask), tokens_seen=0)
    assert report.skipped == ""
    assert "mtp_loss_1" not in report.metrics
    alone = engine_of(groups, "M-")
    without = alone.step(microbatches(some_rows(), 2, mask), tokens_seen=0)
    assert report.loss == without.loss
    assert report.grad_norm == pytest.approx(without.grad_norm, rel=8 * EPSILON)


def test_a_step_without_any_label_is_skipped_by_name(groups: Any) -> None:
    engine = engine_of(groups, "M-/*E")
    before = state_of(engine)
    rows = microbatches(some_rows(), 2, torch.zeros(BATCH, LENGTH))
    report = engine.step(rows, tokens_seen=0, bad_steps=BadSteps(Recovery(skip_nonfinite=False)))
    assert report.skipped == "no token of the step has a label that counts"
    assert report.skipped_kind == "no labels"
    assert all(torch.equal(value, before[name]) for name, value in state_of(engine).items())
