"""The record of a forward pass: its logits, and a loss that equals that of its logits."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import LENGTH, MEGATRON_WARNINGS, VOCAB, batch_of, some_rows, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_a_loss_of_the_head_equals_that_of_its_logits(groups: Any, tied: bool) -> None:
    from hybrid_train.ops.logits import CrossEntropy

    job = tiny_job("M-/*E")
    job.model.tie_embeddings = tied
    model = tiny_model(job, groups)
    batch = batch_of(some_rows(3))
    weights = torch.rand(3, LENGTH)
    outputs = model(batch.tokens, batch.position_ids)
    (depth,) = outputs.mtp_hidden
    term = CrossEntropy(batch.labels.t().flatten())
    total, values = outputs.head.weighted_sum(depth, term, weights)
    found = torch.autograd.grad(total, depth, retain_graph=True)
    logits = outputs.head.logits(depth)[..., :VOCAB]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    torch.testing.assert_close(values.flatten(), expected)
    wanted = torch.autograd.grad((expected * weights.flatten()).sum(), depth)
    torch.testing.assert_close(found, wanted)


def test_mtp_is_not_run_without_positions(groups: Any) -> None:
    model = tiny_model(tiny_job("M-/*E"), groups)
    batch = batch_of(some_rows(3))
    with torch.no_grad():
        outputs = model(batch.tokens)
    assert outputs.mtp_hidden == ()
    assert outputs.hidden.shape == (LENGTH, 3, 32)
    assert outputs.logits().shape == (3, LENGTH, 64)  # the padded rows too


def test_what_is_read_within_the_pass_is_what_the_pass_returns(groups: Any) -> None:
    model = tiny_model(tiny_job("M-"), groups)
    batch = batch_of(some_rows(3))
    with torch.no_grad():
        logits = model(batch.tokens, read=lambda outputs: outputs.logits())
        assert torch.equal(logits, model(batch.tokens).logits())
