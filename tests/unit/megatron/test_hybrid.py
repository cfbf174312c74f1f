"""What is read off the outputs: the cross-entropy of the next token and of each MTP depth."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.data.batch import Batch
from tests.tiny import (
    LENGTH,
    MEGATRON_WARNINGS,
    VOCAB,
    batch_of,
    losses_of,
    some_rows,
    tiny_job,
    tiny_model,
)

pytestmark = MEGATRON_WARNINGS


def rows_of(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    places = torch.arange(LENGTH).expand_as(tokens)
    with torch.no_grad():
        return losses_of(model, Batch(tokens, labels, torch.ones(tokens.shape), places))[1]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


@pytest.mark.parametrize(("pattern", "rows"), [("M*-", 1), ("M-/*E", 2), ("M-/*E/*E", 3)])
def test_there_is_one_row_more_than_depths(groups: Any, pattern: str, rows: int) -> None:
    model = tiny_model(tiny_job(pattern), groups)
    batch = batch_of(some_rows(3))
    losses = rows_of(model, batch.tokens, batch.labels)
    assert losses.shape == (rows, 3, LENGTH)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_first_row_is_the_cross_entropy_of_the_logits(groups: Any, tied: bool) -> None:
    job = tiny_job("ME*-/*E")
    job.model.tie_embeddings = tied
    model = tiny_model(job, groups)
    batch = batch_of(some_rows(3))
    with torch.no_grad():
        logits = model(batch.tokens).logits()
    assert logits.shape == (3, LENGTH, 64)  # the padded rows too
    losses = rows_of(model, batch.tokens, batch.labels)
    torch.testing.assert_close(losses[0], cross_entropy(logits[..., :VOCAB], batch.labels))


def test_padded_rows_of_the_vocabulary_have_no_influence_and_no_gradient(groups: Any) -> None:
    model = tiny_model(tiny_job("ME*-/*E"), groups)
    batch = batch_of(some_rows(3))
    before = rows_of(model, batch.tokens, batch.labels)
    head = model.output_layer.weight
    with torch.no_grad():
        head[VOCAB:] += 10.0
    assert torch.equal(rows_of(model, batch.tokens, batch.labels), before)
    total, _ = losses_of(model, batch)
    (gradient,) = torch.autograd.grad(total, head)
    assert gradient[:VOCAB].abs().amin(dim=1).gt(0).any()
    assert torch.equal(gradient[VOCAB:], torch.zeros_like(gradient[VOCAB:]))


def test_row_of_a_depth_equals_its_parts_put_together_by_hand(groups: Any) -> None:
    """DeepSeek-V3, arXiv:2412.19437, eq. 21 to 23: h' = layers(proj[norm(embedding); norm(h)])."""
    model = tiny_model(tiny_job("M-/*E"), groups)
    depth = model.mtp.layers[0]
    batch = batch_of(some_rows(3))
    with torch.no_grad():
        hidden = model.decoder(model.embedding(batch.tokens, None), attention_mask=None)
        embedded = model.embedding(F.pad(batch.tokens[:, 1:], (0, 1)), None)
        joined = torch.cat([depth.enorm(embedded), depth.hnorm(hidden)], dim=-1)
        inner = depth.mtp_model_layer(joined @ depth.eh_proj.weight.T, attention_mask=None)
        logits = depth.final_layernorm(inner) @ model.output_layer.weight[:VOCAB].T
    expected = cross_entropy(logits.transpose(0, 1)[:, :-1], batch.labels[:, 1:])
    losses = rows_of(model, batch.tokens, batch.labels)
    torch.testing.assert_close(losses[1, :, :-1], expected)


def test_depth_k_at_place_t_is_about_the_label_at_t_plus_k(groups: Any) -> None:
    model = tiny_model(tiny_job("M-/*E/*E"), groups)
    batch = batch_of(some_rows(1))
    place = 7
    changed = batch.labels.clone()
    changed[0, place] = (changed[0, place] + 1) % VOCAB
    before = rows_of(model, batch.tokens, batch.labels)
    after = rows_of(model, batch.tokens, changed)
    assert (before != after).nonzero().tolist() == [[k, 0, place - k] for k in range(3)]


def test_depth_k_sees_no_token_behind_the_one_before_its_label(groups: Any) -> None:
    model = tiny_model(tiny_job("M*-/*E/*E"), groups).eval()
    batch = batch_of(some_rows(1))
    place = 9
    changed = batch.tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % VOCAB
    before = rows_of(model, batch.tokens, batch.labels)
    after = rows_of(model, changed, batch.labels)
    for k in range(3):
        # Products over other rows of a batch may be rounded differently, hence no equality.
        torch.testing.assert_close(after[k, 0, : place - k], before[k, 0, : place - k])
        assert not torch.isclose(after[k, 0, place - k], before[k, 0, place - k])


def test_every_parameter_gets_a_gradient_from_the_sum_of_all_rows(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # Core keeps a scale on the class, in another shape here than where its schedule sets it.
    scale = torch.ones(1)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    model = tiny_model(tiny_job(), groups)
    batch = batch_of(some_rows(4))
    losses_of(model, batch)[0].backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_a_skipped_layer_hands_on_what_it_is_given_until_it_is_back(groups: Any) -> None:
    """Its weights have a gradient of zeros: data parallelism waits for one of each."""
    from hybrid_train.megatron.hybrid import is_skipped, skip

    model, batch = tiny_model(tiny_job("ME*-"), groups), batch_of(some_rows(3))
    before = model(batch.tokens).logits().detach()
    for layer in model.decoder.layers:
        skip(layer)
    assert all(map(is_skipped, model.decoder.layers))
    embedded = model.embedding(batch.tokens, None)
    outputs = model(batch.tokens)
    torch.testing.assert_close(outputs.hidden, model.decoder.final_norm(embedded))
    outputs.logits().sum().backward()
    assert all(not p.grad.any() for p in model.decoder.layers.parameters())
    assert model.embedding.word_embeddings.weight.grad.any()
    for layer in model.decoder.layers:
        skip(layer, skipped=False)
    assert torch.equal(model(batch.tokens).logits(), before)
