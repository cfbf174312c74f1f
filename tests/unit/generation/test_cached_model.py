"""Windows behind the past of unequal rows, against passes over whole sequences."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.precision import GemmFormat
from tests.tiny import MEGATRON_WARNINGS
from tests.unit.generation.conftest import (
    EVERY_KIND,
    VOCAB,
    Build,
    assert_equal_logits,
    full_logits,
    some_tokens,
)

if TYPE_CHECKING:
    from hybrid_train.generation.cached_model import CachedModel

pytestmark = MEGATRON_WARNINGS

PATTERNS = ["M", "*", "*-", "*E", "MEM*M-", EVERY_KIND]
LENGTHS = (5, 26, 11)  # of the prompts, more than a window is scanned without chunks
ROWS = slice(0, 3)


def read_prompts(cached: "CachedModel", tokens: Tensor) -> Tensor:
    """Read the beginnings of three rows, padded on the right; logits [B, W, V]."""
    window = tokens[:, : max(LENGTHS)].clone()
    for row, length in enumerate(LENGTHS):
        window[row, length:] = 0
    hidden = cached.read(ROWS, window.tolist(), LENGTHS)
    assert hidden is not None
    return cached.logits(hidden)


def layers(pattern: str) -> int:
    return len(pattern.split("/")[0]) + 1  # and the output layer


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unequal_prompts_in_one_batch_and_what_follows_equal_each_row_alone(
    build: Build, pattern: str
) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    network, tokens = build(pattern), some_tokens(3, 48)
    cached, expected = CachedModel(network, 4), full_logits(network, tokens)
    found = read_prompts(cached, tokens)
    at = list(LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert_equal_logits(found[row, :length], expected[row, :length], layers(pattern))
    # Windows of several widths, of which the rows keep 1 to all tokens.
    for width, kept in ((1, (1, 1, 1)), (4, (4, 1, 2)), (7, (3, 7, 1)), (20, (20, 2, 11))):
        width = min(width, 48 - max(at))
        window = [tokens[row, at[row] : at[row] + width].tolist() for row in range(3)]
        hidden = cached.read(ROWS, window, None)
        assert hidden is not None
        logits = cached.logits(hidden)
        counts = [min(width, count) for count in kept]
        cached.keep(counts)
        for row in range(3):
            wanted = expected[row, at[row] : at[row] + width]
            assert_equal_logits(logits[row], wanted, layers(pattern))
            at[row] += counts[row]
        assert cached.lengths[ROWS] == at


def test_rows_that_move_keep_their_past(build: Build) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    network, tokens = build(EVERY_KIND), some_tokens(3, 48)
    cached, expected = CachedModel(network, 4), full_logits(network, tokens)
    read_prompts(cached, tokens)
    cached.swap(0, 1)  # 5 11 26 -> rows 1 0 2
    cached.move(2, 3)
    cached.clear(2)
    assert cached.lengths == [LENGTHS[1], LENGTHS[0], 0, LENGTHS[2]]
    for place, row in ((0, 1), (1, 0), (3, 2)):
        token = tokens[row, LENGTHS[row]].item()
        hidden = cached.read(slice(place, place + 1), [[token]], [1])
        assert hidden is not None
        logits = cached.logits(hidden)
        assert_equal_logits(logits[0, 0], expected[row, LENGTHS[row]], layers(EVERY_KIND))


def test_a_rollback_that_is_off_by_one_is_seen(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid_train.generation.cached_model import CachedModel
    from hybrid_train.megatron.row_cache import MambaPast

    network, tokens = build("M"), some_tokens(3, 48)
    expected, keep = full_logits(network, tokens), MambaPast.keep

    def one_more(self: MambaPast, window: Any, kept: Tensor | None) -> None:
        keep(self, window, None if kept is None else kept + 1)

    monkeypatch.setattr(MambaPast, "keep", one_more)
    cached = CachedModel(network, 3)
    read_prompts(cached, tokens)
    window = [tokens[row, LENGTHS[row] : LENGTHS[row] + 4].tolist() for row in range(3)]
    cached.read(ROWS, window, None)
    cached.keep([1, 1, 1])
    follow = [[tokens[row, LENGTHS[row] + 1].item()] for row in range(3)]
    hidden = cached.read(ROWS, follow, [1, 1, 1])
    assert hidden is not None
    wanted = torch.stack([expected[row, LENGTHS[row] + 1] for row in range(3)])
    with pytest.raises(AssertionError):
        assert_equal_logits(cached.logits(hidden)[:, 0], wanted, layers("M"))


def mtp_logits(network: Any, tokens: Tensor) -> Tensor:
    """Logits of the first MTP depth after every token, [B, L, V], from one whole pass."""
    (model,) = network.chunks
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        outputs = model(tokens.to(network.device), positions.to(network.device))
        logits: Tensor = outputs.head.logits(outputs.mtp_hidden[0])
    return logits


@pytest.mark.parametrize("refilled", [True, False], ids="refilled={}".format)
@pytest.mark.parametrize("pattern", [EVERY_KIND, "M-/M*"], ids=str)
def test_first_drafts_are_those_of_a_whole_pass_if_true_states_replace_drafted_ones(
    build: Build, pattern: str, refilled: bool
) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    network, tokens = build(pattern), some_tokens(3, 48)
    expected = mtp_logits(network, tokens)[..., :VOCAB].argmax(-1)
    cached = CachedModel(network, 3)
    window = tokens[:, : max(LENGTHS)].tolist()
    hidden = cached.read(ROWS, window, LENGTHS)
    cached.learn(ROWS, hidden, tokens[:, 1 : max(LENGTHS) + 1].tolist(), LENGTHS)
    at, hits, asked = list(LENGTHS), 0, 0
    for counts in ((4, 1, 2), (1, 3, 4), (2, 2, 2), (4, 4, 4)):
        drafts = cached.propose(ROWS, 3, VOCAB)
        assert drafts is not None
        for row in range(3):
            hits += drafts[row, 0].item() == expected[row, at[row] - 1].item()
            asked += 1
        window = [tokens[row, at[row] : at[row] + 4].tolist() for row in range(3)]
        hidden = cached.read(ROWS, window, None)
        cached.keep(counts)
        following = [tokens[row, at[row] + 1 : at[row] + 5].tolist() for row in range(3)]
        if refilled:
            cached.learn(ROWS, hidden, following, counts)
        at = [start + count for start, count in zip(at, counts, strict=True)]
    assert (hits == asked) is refilled


def test_the_state_of_a_bfloat16_model_is_float32(build: Build) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    network = build("M*", GemmFormat.bf16)
    cached = CachedModel(network, 2)
    hidden = cached.read(slice(0, 2), some_tokens(2, 9).tolist(), [9, 4])
    assert hidden is not None
    assert hidden.dtype == torch.bfloat16
    inputs, state = cached._passes[0].cache.states()
    assert (inputs.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert cached.logits(hidden).isfinite().all()


def test_layers_with_unequal_heads_keep_what_each_needs(build: Build) -> None:
    from hybrid_train.generation.cached_model import CachedModel

    network, tokens = build("MM**", unequal=True), some_tokens(3, 48)
    expected = full_logits(network, tokens)
    found = read_prompts(CachedModel(network, 3), tokens)
    for row, length in enumerate(LENGTHS):
        assert_equal_logits(found[row, :length], expected[row, :length], layers=5)


def test_every_layer_kind_matters_to_the_logits(build: Build) -> None:
    """The comparisons above would pass for a layer that adds nothing."""
    network, tokens = build(EVERY_KIND), some_tokens(1, 12)
    whole = full_logits(network, tokens)
    for layer in network.chunks[0].decoder.layers:
        weight = layer.state_dict(keep_vars=True)
        last = next(
            w for n, w in weight.items() if "out_proj" in n or "linear_proj" in n or "fc2" in n
        )
        kept = last.data.clone()
        last.data.zero_()
        assert (full_logits(network, tokens) - whole).abs().max() > 1e-2
        last.data.copy_(kept)
