"""Documents that share a row: logits, losses and gradients are those of each alone in a row."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hybrid_train.data.batch import Batch
from hybrid_train.ops.attention import causal_attention
from hybrid_train.schema.parallel import Parallel, Recompute
from hybrid_train.schema.problems import UserError
from tests import tiny
from tests.packed import alone_in_a_row, documents, index_of, packed_batch
from tests.tiny import MEGATRON_WARNINGS, VOCAB, tiny_job, tiny_model

pytestmark = MEGATRON_WARNINGS
PATTERN = "MEM*M-/*ME/*ME"
DEPTHS = 2
LENGTH = 24
PLACES = [(6, 1, 9), (3, 2, 18, 1), (24,)]  # with padding, without, one document alone


def rows() -> list[list[np.ndarray]]:
    return [documents(*places, seed=seed) for seed, places in enumerate(PLACES)]


def model_of(groups: Any, **sections: Any) -> Any:
    """A model whose balance loss is off: it is of rows, not of documents."""
    job = tiny_job(PATTERN, **sections)
    job.train.sequence_length = LENGTH
    job.objective.moe_aux_loss_scale = 0.0
    return tiny_model(job, groups)


def losses_of(model: Any, batch: Batch) -> Tensor:
    """Losses of every depth, [1 + D, B, S]."""
    return tiny.losses_of(model, batch)[1]


def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits of every depth, [1 + D, B, S, V]."""
    outputs = model(
        batch.tokens,
        batch.position_ids,
        sequence_index=batch.sequence_index,
        padding=batch.padding,
    )
    depths = (outputs.hidden, *outputs.mtp_hidden)
    return torch.stack([outputs.head.logits(hidden) for hidden in depths])


def plain_losses_of(model: Any, batch: Batch) -> Tensor:
    """The same losses by autograd on the logits, each with a gradient; [1 + D, B, S]."""
    logits = logits_of(model, batch)[..., :VOCAB].permute(0, 3, 1, 2)
    labels = [batch.labels.roll(-d, dims=1) for d in range(1 + DEPTHS)]
    return functional.cross_entropy(logits, torch.stack(labels), reduction="none")


def each_alone(
    of: Callable[[Any, Batch], Tensor], model: Any, packed: Tensor, rows: Sequence[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what a document has in its row and alone, where a depth predicts its tokens."""
    pairs = []
    for row, pieces in enumerate(rows):
        start = 0
        for piece in pieces:
            places = len(piece) - 1
            whole = of(model, alone_in_a_row(piece))
            for depth in range(1 + DEPTHS):
                counts = max(0, places - depth)
                pairs.append((packed[depth, row, start : start + counts], whole[depth, 0, :counts]))
            start += places
    return pairs


@pytest.mark.parametrize("of", [logits_of, losses_of])
def test_every_depth_has_for_a_token_what_it_has_in_a_row_alone(
    groups: Any, of: Callable[[Any, Batch], Tensor]
) -> None:
    model = model_of(groups).eval()
    with torch.no_grad():
        packed = of(model, packed_batch(rows(), LENGTH))
        pairs = each_alone(of, model, packed, rows())
    assert len(pairs) == (1 + DEPTHS) * sum(map(len, PLACES))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)


def test_without_the_index_documents_see_each_other(groups: Any) -> None:
    model = model_of(groups).eval()
    batch = packed_batch(rows(), LENGTH)
    concatenated = Batch(batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
    with torch.no_grad():
        apart, all_or_none = (logits_of(model, one) for one in (batch, concatenated))
    first = slice(0, PLACES[0][0] - DEPTHS)
    torch.testing.assert_close(apart[:, 0, first], all_or_none[:, 0, first])
    behind = slice(PLACES[0][0], sum(PLACES[0]))
    assert not torch.isclose(apart[0, 0, behind], all_or_none[0, 0, behind]).all(dim=1).any()


def gradients(model: Any, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


PLANS = {
    "kept": Parallel(),
    "full": Parallel(recompute=Recompute.full),
    "selective": Parallel(recompute=Recompute.selective),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_of_a_packed_row_are_the_sum_of_those_of_its_documents(
    groups: Any, plan: Parallel
) -> None:
    model = model_of(groups, parallel=plan)
    losses = plain_losses_of(model, packed_batch(rows(), LENGTH))
    pairs = each_alone(plain_losses_of, model, losses, rows())
    weight = torch.linspace(0.5, 1.5, 7)  # documents and depths do not count alike

    def total(side: int) -> Tensor:
        terms = [pair[side].sum() * weight[n % 7] for n, pair in enumerate(pairs)]
        return torch.stack(terms).sum()

    found, expected = gradients(model, total(0)), gradients(model, total(1))
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, name  # float32 sums; those of A_log and dt_bias cancel, and reach 4e-6


def routed(groups: Any, length: int, scale: float = 0.1) -> tuple[Any, dict[str, Tensor]]:
    """A model that has seen the first row with so much padding, and gradients of its router."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    job = tiny_job(PATTERN)
    job.train.sequence_length = length
    job.objective.moe_aux_loss_scale = scale
    model = tiny_model(job, groups)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    batch = packed_batch(rows()[:1], length)
    losses = plain_losses_of(model, batch)
    continued = torch.stack([batch.loss_weights] + [torch.zeros_like(batch.loss_weights)] * DEPTHS)
    found = gradients(model, (losses * continued).sum())
    return model, {name: g for name, g in found.items() if "router" in name}


def balance_loss(model: Any) -> Tensor:
    """What the routers of a model have recorded."""
    (record,) = {id(m.balance_losses): m.balance_losses for m in routers_of(model)}.values()
    return record.take()


def routers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "TopKRouter"]


def test_padding_counts_in_no_expert_load(groups: Any) -> None:
    model, _ = routed(groups, LENGTH)
    loads = [router.local_tokens_per_expert for router in routers_of(model)]
    taken, top_k = sum(PLACES[0]), 2
    # The block of MTP serves both depths.
    assert [load.sum().item() for load in loads] == [taken * top_k, DEPTHS * taken * top_k]


def test_padding_changes_neither_the_balance_loss_nor_its_gradient(groups: Any) -> None:
    padded_model, padded = routed(groups, LENGTH)
    full_model, full = routed(groups, sum(PLACES[0]))
    torch.testing.assert_close(balance_loss(padded_model), balance_loss(full_model))
    _, without = routed(groups, LENGTH, scale=0.0)
    assert full
    for name, gradient in full.items():
        torch.testing.assert_close(padded[name], gradient)
        assert not torch.allclose(without[name], gradient)


def test_a_row_of_padding_alone_has_no_balance_loss(groups: Any) -> None:
    job = tiny_job(PATTERN)
    job.objective.moe_aux_loss_scale = 0.1
    model = tiny_model(job, groups)
    losses = losses_of(model, packed_batch([[]], LENGTH))
    assert losses.isfinite().all()
    assert balance_loss(model) == 0


class ListOfDocuments(torch.nn.Module):
    """Attention over a list of documents, in the words of Transformer Engine's wrapper."""

    def __init__(self, context_parallel_size: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_parallel_size=context_parallel_size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: Any,
        attn_mask_type: str,
    ) -> Tensor:
        assert (packed_seq_params.qkv_format, attn_mask_type) == ("thd", "causal")
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert ends == packed_seq_params.cu_seqlens_kv.tolist()
        assert max(end - start for start, end in pairwise(ends)) <= packed_seq_params.max_seqlen_q
        parts = (query[:, None], key[:, None], value[:, None])
        return torch.cat([
            causal_attention(*(part[start:end] for part in parts)) for start, end in pairwise(ends)
        ]).squeeze(1)  # fmt: skip


def fused_attention(monkeypatch: pytest.MonkeyPatch, **settings: int) -> Any:
    """What stands before Transformer Engine's attention, over one that is written out."""
    from hybrid_train.megatron import mamba

    monkeypatch.setattr(mamba.te, "TEDotProductAttention", ListOfDocuments)
    return mamba.attention_of_documents()(**settings)


def test_transformer_engine_gets_rows_as_a_list_of_documents(
    groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.megatron import mamba

    index = index_of([3, 1, 4], [8], [2, 6])
    told = mamba.packed_arguments(index, None, groups, SimpleNamespace(sequence_parallel=False))
    q, (k, v) = torch.randn(8, 3, 4, 8), torch.randn(2, 8, 3, 2, 8)
    found = fused_attention(monkeypatch)(
        q, k, v, None, attn_mask_type="causal", packed_seq_params=told["packed_seq_params"]
    )
    torch.testing.assert_close(found, causal_attention(q, k, v, index))


def test_transformer_engine_refuses_packed_rows_over_context_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.randn(8, 1, 4, 8)
    with pytest.raises(UserError, match=r"need parallel\.context=1"):
        fused_attention(monkeypatch, context_parallel_size=2)(
            q, q, q, None, attn_mask_type="causal", packed_seq_params=SimpleNamespace()
        )
