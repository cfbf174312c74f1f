"""Cached decoding of tiny models against their forward pass over whole sequences."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from hybrid_train.runtime.start import process
from hybrid_train.schema.model import (
    Attention,
    AttentionSizes,
    LayerRule,
    Mamba,
    MambaSizes,
    Mlp,
    Model,
    Moe,
)
from hybrid_train.schema.precision import GemmFormat, Precision
from hybrid_train.schema.runtime import Kernels, Runtime
from hybrid_train.schema.train import Train, TrainJob
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS

if TYPE_CHECKING:
    from hybrid_train.megatron.hybrid import Hybrid

pytestmark = MEGATRON_WARNINGS

VOCAB = 61  # padded to 128 by the model
EVERY_KIND = "MEM*M-/*E/*E"  # with two MTP depths, which generation does not run
PATTERNS = ["M", "*", "*-", "*E", "MEM*M-", EVERY_KIND]
UNEQUAL = [
    LayerRule(layers="2", mamba=MambaSizes(heads=4)),
    LayerRule(layers="4", attention=AttentionSizes(heads=8, kv_heads=1)),
]
LONGEST_SUM = 128  # terms of the longest sum in a layer: inner width of Mamba and MLP

Build = Callable[..., "Hybrid"]


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Builder of tiny models by pattern, in a process of one rank."""
    runtime = Runtime(kernels=Kernels.plain, threads=1)
    with process(runtime, seed=1234):
        from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
        from hybrid_train.model.build import build_model

        job = TrainJob(runtime=runtime, precision=Precision(format=GemmFormat.fp32))
        groups = build_groups(job.parallel, timeout_s=60)

        @cache
        def build(
            pattern: str, number_format: GemmFormat = GemmFormat.fp32, unequal: bool = False
        ) -> "Hybrid":
            job = tiny_job(pattern, number_format)
            job.model.layers = UNEQUAL if unequal else []
            on_gpu = torch.cuda.is_available()
            model = build_model(job, groups, VOCAB, on_gpu=on_gpu).chunks[0]
            # New weights are small: every layer would be a faint echo of the embedding.
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and "conv" not in name:
                    weight.data.mul_(2)
            return model

        yield build
        destroy_groups()


def tiny_job(pattern: str, number_format: GemmFormat) -> TrainJob:
    return TrainJob(
        run_dir="unused",
        train=Train(tokens="1M", sequence_length=64, global_batch=1),
        model=Model(
            pattern=pattern,
            hidden_size=64,
            attention=Attention(heads=4, kv_heads=2, head_dim=16),
            mamba=Mamba(heads=8, head_dim=16, state_size=16, groups=2, chunk_size=8),
            mlp=Mlp(intermediate_size=128),
            moe=Moe(experts=4, top_k=2, intermediate_size=64, shared_intermediate_size=64,
                    latent_size=32),
        ),
        precision=Precision(format=number_format),
    )  # fmt: skip


def some_tokens(model: "Hybrid", batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), device=model.output_layer.weight.device)


def full_logits(model: "Hybrid", tokens: Tensor) -> Tensor:
    """Logits after every token, [B, L, V], from one pass without a cache."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(tokens).logits()
    return logits


def cached_logits(model: "Hybrid", tokens: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt and after each later token, [B, L - prompt + 1, V]."""
    from hybrid_train.generation.decode import Cache

    model.train()
    model.eval()
    memory = Cache(model, len(tokens), tokens.shape[1])
    logits = [memory.read(tokens[:, :prompt])]
    logits += [memory.read(tokens[:, t : t + 1]) for t in range(prompt, tokens.shape[1])]
    return torch.stack(logits, dim=1)


def assert_equal_logits(actual: Tensor, expected: Tensor, layers: int) -> None:
    """Both sum the same float32 terms in another order.

    The roundings of a sum of K terms are a random walk of K steps of half an ulp; each layer adds
    as much, and the residual stream carries the sum on.
    """
    eps = torch.finfo(torch.float32).eps
    bound = layers * LONGEST_SUM**0.5 * eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prompt", sampled([1, 3, 8, 21], 1, 21), ids="prompt={}".format)
def test_cached_logits_equal_full_forward_logits(build: Build, pattern: str, prompt: int) -> None:
    model = build(pattern)
    tokens = some_tokens(model, batch=3, length=29)  # chunks of 8: the last one is short
    expected = full_logits(model, tokens)[:, prompt - 1 :]
    actual = cached_logits(model, tokens, prompt)
    layers = len(pattern.split("/")[0]) + 1  # and the output layer
    assert_equal_logits(actual, expected, layers)


def test_caches_of_layers_with_unequal_heads_hold_what_each_needs(build: Build) -> None:
    model = build("MM**", unequal=True)
    tokens = some_tokens(model, batch=3, length=29)
    actual = cached_logits(model, tokens, prompt=8)
    assert_equal_logits(actual, full_logits(model, tokens)[:, 7:], layers=5)


def test_every_layer_kind_matters_to_the_logits(build: Build) -> None:
    """The comparison above would pass for a layer that adds nothing."""
    model = build(EVERY_KIND)
    tokens = some_tokens(model, batch=1, length=12)
    whole = full_logits(model, tokens)
    for layer in model.decoder.layers:
        weight = layer.state_dict(keep_vars=True)
        last = next(
            w for n, w in weight.items() if "out_proj" in n or "linear_proj" in n or "fc2" in n
        )
        kept = last.data.clone()
        last.data.zero_()
        assert (full_logits(model, tokens) - whole).abs().max() > 1e-2
        last.data.copy_(kept)


def test_two_caches_used_in_turn_do_not_disturb_each_other(build: Build) -> None:
    from hybrid_train.generation.decode import Cache

    model = build(EVERY_KIND)
    tokens = some_tokens(model, batch=3, length=10)
    expected = cached_logits(model, tokens, prompt=4)
    memories = [Cache(model, 3, 10), Cache(model, 1, 10)]
    parts = [tokens, tokens[:1]]
    steps = [slice(0, 4), *(slice(t, t + 1) for t in range(4, 10))]
    actual = [[m.read(p[:, s]) for m, p in zip(memories, parts, strict=True)] for s in steps]
    torch.testing.assert_close(torch.stack([a for a, _ in actual], 1), expected, rtol=0, atol=0)
    assert_equal_logits(torch.stack([b for _, b in actual], 1), expected[:1], layers=7)


def test_the_ssm_state_of_a_bfloat16_model_is_float32(build: Build) -> None:
    model = build("M*", GemmFormat.bf16)
    tokens = some_tokens(model, batch=2, length=9)
    from hybrid_train.generation.decode import Cache

    memory = Cache(model.eval(), 2, 9)
    assert memory.read(tokens[:, :5]).dtype == torch.bfloat16
    conv, ssm = memory.states(layer=1)
    assert (conv.dtype, ssm.dtype) == (torch.bfloat16, torch.float32)
    assert memory.read(tokens[:, 5:6]).isfinite().all()


def test_a_cache_refuses_what_it_has_no_room_for(build: Build) -> None:
    from hybrid_train.generation.decode import Cache

    model = build("M*").eval()
    tokens = some_tokens(model, batch=2, length=9)
    memory = Cache(model, 2, 8)
    with pytest.raises(ValueError, match="exceed max_length = 8"):
        memory.read(tokens)
    memory.read(tokens[:, :7])
    with pytest.raises(ValueError, match="then \\[2, 1\\]"):
        memory.read(tokens[:, 7:])
    with pytest.raises(ValueError, match="needs \\[2, any\\]"):
        memory.read(tokens[:1, 7:8])


PROMPTS = [[5, 7, 11], [13], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22], [13, 13, 13]]


def greedy_without_cache(model: "Hybrid", prompt: list[int], new: int) -> list[int]:
    tokens = torch.tensor([prompt], device=model.output_layer.weight.device)
    for _ in range(new):
        token = full_logits(model, tokens)[:, -1, :VOCAB].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, token), dim=1)
    return [int(token) for token in tokens[0, len(prompt) :]]


def test_prompts_of_different_lengths_each_get_their_greedy_continuation(build: Build) -> None:
    from hybrid_train.generation.decode import Settings, generate

    model = build(EVERY_KIND)
    expected = [greedy_without_cache(model, prompt, 9) for prompt in PROMPTS]
    assert generate(model, PROMPTS, Settings(vocab_size=VOCAB, max_new_tokens=9)) == expected


def test_a_sequence_stops_at_its_end_of_document_and_the_others_go_on(build: Build) -> None:
    from hybrid_train.generation.decode import Settings, generate

    model = build(EVERY_KIND)
    settings = Settings(vocab_size=VOCAB, max_new_tokens=12, temperature=1.0)
    free = generate(model, PROMPTS, settings)
    end = free[0][3]  # drawn early in the first sequence
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert generate(model, PROMPTS, replace(settings, ends=frozenset([end]))) == expected
    assert len({len(tokens) for tokens in expected}) > 1


def test_equal_seeds_draw_equal_text_and_others_do_not(build: Build) -> None:
    from hybrid_train.generation.decode import Settings, generate

    model = build("M*-")
    settings = Settings(vocab_size=VOCAB, max_new_tokens=20, temperature=1.0, top_k=40, top_p=0.9)
    first = generate(model, PROMPTS, settings)
    torch.rand(1)  # the global generator does not matter
    assert generate(model, PROMPTS, settings) == first
    assert generate(model, PROMPTS, replace(settings, seed=1)) != first


def test_padding_of_the_vocabulary_is_never_drawn(build: Build) -> None:
    from hybrid_train.generation.decode import Settings, generate

    settings = Settings(vocab_size=3, max_new_tokens=50, temperature=100.0)
    (tokens,) = generate(build("M*"), [[1]], settings)
    assert set(tokens) == {0, 1, 2}


def test_a_stream_gives_each_token_once_and_none_before_or_after(build: Build) -> None:
    from hybrid_train.generation.decode import (
        Settings,
        generate,
        stream,
    )

    model, prompts = build("M*"), [[1], [1, 2, 3]]
    settings = Settings(vocab_size=VOCAB, max_new_tokens=4)
    steps = list(stream(model, prompts, settings))
    fresh = [[token is not None for token in step] for step in steps]
    assert fresh == [[True, False]] * 2 + [[True, True]] * 2 + [[False, True]] * 2
    columns = [[step[row] for step in steps if step[row] is not None] for row in (0, 1)]
    assert columns == generate(model, prompts, settings)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]], ids=str)
def test_no_prompt_and_an_empty_prompt_are_refused(build: Build, prompts: list[list[int]]) -> None:
    from hybrid_train.generation.decode import Settings, generate

    with pytest.raises(ValueError, match="at least one prompt, of at least one token"):
        generate(build("M*"), prompts, Settings(vocab_size=VOCAB))


def test_generation_leaves_no_trace_in_a_model_that_trains(build: Build) -> None:
    from hybrid_train.generation.decode import (
        Settings,
        generate,
        stream,
    )

    model = build(EVERY_KIND).train()
    tokens = some_tokens(model, batch=1, length=8)
    before = model(tokens).logits()
    state = {name: value.clone() for name, value in model.named_buffers()}
    settings = Settings(vocab_size=VOCAB, max_new_tokens=3)
    generate(model, PROMPTS, settings)
    next(stream(model, PROMPTS, settings))  # and left unfinished
    assert model.training
    for name, value in model.named_buffers():  # the expert load among them
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    after = model(tokens).logits()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    after.sum().backward()


def test_changed_weights_are_used_at_once(build: Build) -> None:
    from hybrid_train.generation.decode import Settings, generate

    model = build("M").eval()
    settings = Settings(vocab_size=VOCAB, max_new_tokens=30)
    generate(model, [[1, 2]], settings)
    decay = model.decoder.layers[0].mixer.A_log
    kept = decay.data.clone()
    decay.data.fill_(-6.0)  # core remembers -exp(A_log) between steps
    try:
        expected = greedy_without_cache(model, [1, 2], 30)
        assert generate(model, [[1, 2]], settings) == [expected]
    finally:
        decay.data.copy_(kept)
