"""Layers bound to their weights: what is no plain GEMM is asked, what is not known refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.problems import UserError
from tests.pruned import disturb
from tests.tiny import LENGTH, MEGATRON_WARNINGS, VOCAB, as_family, some_rows, tiny_job

pytestmark = MEGATRON_WARNINGS
PATTERN = "ME*-/*E"


def chunk_of(groups: Any, family: str = "") -> Any:
    from hybrid_train.model.build import build_model

    job = tiny_job(PATTERN if family in ("", "hybrid") else "*-*-")
    if family:
        as_family(job.model, family)
    chunk = build_model(job, groups, VOCAB, on_gpu=False).chunks[0].eval()
    if family:
        disturb(chunk)  # biases too
    return chunk


def by_windows(chunk: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Logits behind each token [B, L, V], and the drafts' behind all but the last, [B, L-1, V]."""
    from hybrid_train.megatron.window_pass import ChunkPass, DraftPass, bound_head

    with torch.inference_mode():
        read, head = ChunkPass(chunk, 2), bound_head(chunk)

        def run(one: Any, *given: Tensor) -> Tensor:
            width = given[-1].shape[1]
            one.cache.open(slice(0, 2), width, [width] * 2)
            made: Tensor = one(*given)
            one.cache.close([width] * 2)
            return made

        hidden = torch.cat([run(read, window) for window in tokens.split([3, 1, 5], dim=1)], dim=1)
        if not chunk.mtp_process:
            return (head(hidden),)
        draft = DraftPass(chunk, 2)
        parts = zip(
            hidden[:, :-1].split([2, 1, 5], 1), tokens[:, 1:].split([2, 1, 5], 1), strict=True
        )
        drafted = torch.cat([run(draft, state, token) for state, token in parts], dim=1)
        return head(hidden), head(drafted)


@pytest.mark.parametrize("family", ["", "hybrid", "llama", "qwen", "nemotron"])
@pytest.mark.parametrize("asked", [False, True], ids=["bound", "asked"])
def test_windows_give_the_logits_of_a_whole_pass_of_core(
    groups: Any, asked: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.megatron import norms, plain

    chunk, tokens = chunk_of(groups, family), some_rows()[:2, :9]
    positions = torch.arange(9).expand_as(tokens)
    if asked:  # as of tensor ranks, of quantized GEMMs, of Transformer Engine
        monkeypatch.setattr(plain, "bare_weight", lambda *_: None)
        monkeypatch.setattr(plain, "bare_experts", lambda _: None)
        monkeypatch.setattr(norms, "Norm", type("NoNorm", (), {}))
    with torch.no_grad():
        outputs = chunk(tokens, positions)
        drafted = [outputs.head.logits(one)[:, :-1] for one in outputs.mtp_hidden]
        expected = (outputs.logits(), *drafted)
    torch.testing.assert_close(by_windows(chunk, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_of_another_kind_is_refused_by_the_name_of_its_class(groups: Any) -> None:
    from hybrid_train.megatron.window_pass import ChunkPass

    chunk = chunk_of(groups)
    chunk.decoder.layers[3].mlp = torch.nn.Tanh()
    with pytest.raises(UserError, match="does not know how a layer with Tanh reads tokens"):
        ChunkPass(chunk, 1)


def test_no_pass_is_read_before_it_is_opened(groups: Any) -> None:
    from hybrid_train.megatron.window_pass import ChunkPass

    read = ChunkPass(chunk_of(groups), 1)
    with pytest.raises(AssertionError, match="no pass has begun"):
        read(some_rows()[:1, :LENGTH])
