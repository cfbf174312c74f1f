"""Counts against published checkpoints, a profiled reference model and closed forms."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from hybrid_train.anatomy.counts import cache_size, flops_per_token, parameters
from hybrid_train.schema.model import Attention, Mamba, Mlp, Model, Moe, Mtp

VOCAB = 131_072

H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H_47B = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
    "-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)
H_56B = "M-M-M-M*" + 9 * "-M-M-M-M-M*" + "-M-M-M-M-M-"
NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
    "EMEMEMEM*EMEMEMEME"
)


def geometry(
    pattern: str,
    hidden: int,
    mamba: tuple[int, int, int],
    attention: tuple[int, int],
    **sizes: int,
) -> Model:
    """A model of the family: head width 128, 8 groups; `mamba` is heads, width, state."""
    mlp = Mlp(intermediate_size=sizes.pop("mlp")) if "mlp" in sizes else Mlp()
    return Model(
        pattern=pattern,
        hidden_size=hidden,
        mamba=Mamba(heads=mamba[0], head_dim=mamba[1], state_size=mamba[2], groups=8),
        attention=Attention(heads=attention[0], kv_heads=attention[1], head_dim=128),
        mlp=mlp,
        moe=Moe(**sizes) if sizes else Moe(),
    )


def nano_30b(mtp: str = "") -> Model:
    moe = {"experts": 128, "top_k": 6, "intermediate_size": 1856, "shared_intermediate_size": 3712}
    return geometry(NANO_30B + mtp, 2688, (64, 64, 128), (32, 2), **moe)


def super_120b(mtp: str = "") -> Model:
    moe = {"experts": 512, "top_k": 22, "intermediate_size": 2688}
    moe |= {"shared_intermediate_size": 5376, "latent_size": 1024}
    return geometry(SUPER + mtp, 4096, (128, 64, 128), (32, 2), **moe)


def ultra_550b(mtp: str = "") -> Model:
    moe = {"experts": 512, "top_k": 22, "intermediate_size": 5120}
    moe |= {"shared_intermediate_size": 10240, "latent_size": 2048}
    return geometry(ULTRA + mtp, 8192, (256, 64, 128), (64, 2), **moe)


# Elements of the published files (Nano 3 4B, Lightning 3.5 and Super 3 as their verification cards
# in NVIDIA-NeMo/Megatron-Bridge print them), or of the same tensors with the published sizes.
PUBLISHED = {
    "Nemotron-H 4B": (geometry(H_8B, 3072, (112, 64, 128), (32, 8), mlp=12288), 4_489_223_040),
    "Nemotron-H 8B": (geometry(H_8B, 4096, (128, 64, 128), (32, 8), mlp=21504), 8_100_852_736),
    "Nemotron-H 47B": (geometry(H_47B, 8192, (256, 64, 256), (64, 8), mlp=30720), 46_791_554_816),
    "Nemotron-H 56B": (geometry(H_56B, 8192, (256, 64, 256), (64, 8), mlp=32768), 56_324_350_464),
    "Nano 9B v2": (geometry(NANO_9B, 4480, (128, 80, 128), (40, 8), mlp=15680), 8_888_227_328),
    "Nano 12B v2": (geometry(NANO_12B, 5120, (128, 80, 128), (40, 8), mlp=20480), 12_310_001_152),
    "Nano 3 4B": (geometry(NANO_4B, 3136, (96, 80, 128), (40, 8), mlp=12544), 3_973_556_832),
    "Nano 3 30B-A3B": (nano_30b(), 31_577_940_288),
    "Lightning 3.5": (nano_30b("/*E/*E"), 32_913_266_240),
    "Super 3 trunk": (super_120b(), 120_668_707_840),
    "Super 3": (super_120b("/*E/*E"), 123_611_033_088),
    "Ultra 3 trunk": (ultra_550b(), 549_308_993_536),
    "Ultra 3": (ultra_550b("/*E/*E"), 560_524_603_904),
}


@pytest.mark.parametrize(("model", "elements"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_total_equals_the_published_checkpoint_to_the_unit(model: Model, elements: int) -> None:
    assert parameters(model, VOCAB).total == elements


@pytest.mark.parametrize(
    ("model", "active", "without_embedding"),
    [(nano_30b(), 3.580, 3.228), (super_120b(), 12.770, 12.233), (ultra_550b(), 56.06, 54.99)],
    ids=["Nano 3", "Super 3", "Ultra 3"],
)
def test_active_parameters_are_those_published(
    model: Model, active: float, without_embedding: float
) -> None:
    count = parameters(model, VOCAB)
    # Published with three or four digits.
    assert count.active / 1e9 == pytest.approx(active, rel=2e-4)
    assert count.active_without_embedding / 1e9 == pytest.approx(without_embedding, rel=2e-4)


def test_without_experts_every_parameter_is_active() -> None:
    count = parameters(PUBLISHED["Nemotron-H 8B"][0], VOCAB)
    assert count.active == count.total


def small(pattern: str, **changes: Any) -> Model:
    model = Model(
        pattern=pattern,
        hidden_size=48,
        attention=Attention(heads=4, kv_heads=2, head_dim=16),
        mamba=Mamba(heads=8, head_dim=8, state_size=16, groups=2, chunk_size=16),
        mlp=Mlp(intermediate_size=96),
        moe=Moe(
            experts=8, top_k=2, intermediate_size=40, shared_intermediate_size=56, latent_size=24
        ),
    )
    return dataclasses.replace(model, **changes)


def nemotron_h(model: Model, vocab_size: int) -> NemotronHForCausalLM:
    """The same model in `transformers`."""
    kinds = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            layers_block_type=[kinds[letter] for letter in model.pattern],
            num_attention_heads=model.attention.heads,
            num_key_value_heads=model.attention.kv_heads,
            head_dim=model.attention.head_dim,
            mamba_num_heads=model.mamba.heads,
            mamba_head_dim=model.mamba.head_dim,
            ssm_state_size=model.mamba.state_size,
            n_groups=model.mamba.groups,
            conv_kernel=4,
            intermediate_size=model.mlp.intermediate_size,
            n_routed_experts=model.moe.experts,
            num_experts_per_tok=model.moe.top_k,
            moe_intermediate_size=model.moe.intermediate_size,
            moe_shared_expert_intermediate_size=model.moe.shared_intermediate_size,
            moe_latent_size=model.moe.latent_size,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            tie_word_embeddings=False,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )


@pytest.mark.parametrize("pattern", ["*-", "ME", "MEM*-E"])
def test_parameters_equal_those_of_transformers(pattern: str) -> None:
    reference = nemotron_h(small(pattern), vocab_size=64)
    elements = sum(p.numel() for p in reference.parameters())
    biases = sum(b.numel() for n, b in reference.named_buffers() if "correction_bias" in n)
    assert parameters(small(pattern), 64).total == elements + biases


def test_flops_equal_those_profiled_on_transformers() -> None:
    # The profiler sees products and convolutions. The reference scans Mamba-2 elementwise and
    # computes the whole square of attention scores, so M is left out and * is put right here.
    length, pattern = 24, "*-E*"
    reference = nemotron_h(small(pattern), vocab_size=64)
    with FlopCounterMode(display=False) as profile, torch.no_grad():
        reference(torch.randint(64, (2, length)), use_cache=False)
    profiled = profile.get_total_flops() // (2 * length)
    unseen = 2 * 2 * (4 * 16) * (length - 1)  # two layers: 2 * width * (2 L - (L + 1))
    assert flops_per_token(small(pattern), 64, length).forward + unseen == profiled


def test_flops_of_a_gated_transformer_equal_those_profiled_on_llama() -> None:
    length, model = 24, small("*-*-", mlp=Mlp(intermediate_size=96, gated=True))
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="eager",
        pad_token_id=None,
    )  # fmt: skip
    reference = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as profile, torch.no_grad():
        reference(torch.randint(64, (2, length)), use_cache=False)
    profiled = profile.get_total_flops() // (2 * length)
    unseen = 2 * 2 * (4 * 16) * (length - 1)  # two layers: 2 * width * (2 L - (L + 1))
    assert flops_per_token(model, 64, length).forward + unseen == profiled


def test_flops_of_llama_3_1_8b_are_six_times_its_weights_and_its_scores() -> None:
    """6 N of the weights that are multiplied, and 6 L d a layer for scores of half the square."""
    model = Model(
        pattern="*-" * 32, hidden_size=4096, attention=Attention(heads=32, kv_heads=8),
        mlp=Mlp(intermediate_size=14336, gated=True),
    )  # fmt: skip
    vocab, length = 128_256, 8192
    total = parameters(model, vocab).total
    assert total == 8_030_261_248
    multiplied = total - vocab * 4096 - 65 * 4096  # neither the embedding nor norms
    scores = 6 * 32 * 4096 * (length + 1)
    assert flops_per_token(model, vocab, length).training == 6 * multiplied + scores


@pytest.mark.parametrize(
    ("model", "sequence_length", "published"),
    [(super_120b("/*E/*E"), 4096, 83.7e9), (ultra_550b("/*E/*E"), 8192, 361e9)],
    ids=["Super 3, H100", "Ultra 3, GB300"],
)
def test_training_flops_are_those_behind_published_speeds(
    model: Model, sequence_length: int, published: float
) -> None:
    # TFLOP/s over tokens/s in the performance tables of NVIDIA-NeMo/Megatron-Bridge. Their counter
    # takes 7 instead of 4 operations for the scan: 0.5% here; and the figures have three digits.
    flops = flops_per_token(model, VOCAB, sequence_length).training
    assert flops == pytest.approx(published, rel=0.01)


def test_mamba_flops_are_products_convolution_and_recurrence() -> None:
    inner, state, heads, hidden = 64, 16, 8, 48
    channels = inner + 2 * 2 * state
    in_proj, out_proj = hidden * (inner + channels + heads), inner * hidden
    recurrence = heads * 2 * (8 * state)  # multiply-adds: into the state and out of it
    assert flops_per_token(small("M"), 64, 10).by_kind["M"] == 2 * (
        in_proj + out_proj + 4 * channels + recurrence
    )


def test_only_attention_grows_with_the_sequence() -> None:
    short = flops_per_token(small("M*-E"), 64, 8).by_kind
    long = flops_per_token(small("M*-E"), 64, 1024).by_kind
    assert {kind for kind in short if short[kind] != long[kind]} == {"*"}


def test_a_training_step_costs_three_forward_passes() -> None:
    count = flops_per_token(small("M*-E"), 64, 8)
    assert count.training == 3 * count.forward == 3 * sum(count.by_kind.values())


def test_a_repeated_mtp_block_is_stored_once_and_computed_at_every_depth() -> None:
    once, twice = small("M-/*E"), small("M-/*E/*E")
    assert parameters(once, 64).by_kind["mtp"] == parameters(twice, 64).by_kind["mtp"]
    work = flops_per_token(once, 64, 8).by_kind["mtp"]
    assert flops_per_token(twice, 64, 8).by_kind["mtp"] == 2 * work


def test_mtp_blocks_of_their_own_are_stored_once_per_depth() -> None:
    shared = small("M-/*E/*E")
    own = dataclasses.replace(shared, mtp=Mtp(repeated_block=False))
    assert parameters(own, 64).by_kind["mtp"] == 2 * parameters(shared, 64).by_kind["mtp"]
    assert flops_per_token(own, 64, 8) == flops_per_token(shared, 64, 8)


def test_every_mtp_depth_runs_the_head() -> None:
    small_head = flops_per_token(small("M-/*-/*-"), 64, 8)
    large_head = flops_per_token(small("M-/*-/*-"), 128, 8)
    extra = large_head.by_kind["head"] - small_head.by_kind["head"]
    assert large_head.forward - small_head.forward == 3 * extra


def test_tied_embeddings_are_counted_once_and_the_head_still_computes() -> None:
    apart, tied = small("M-"), small("M-", tie_embeddings=True)
    assert parameters(apart, 64).total - parameters(tied, 64).total == 64 * 48
    assert parameters(tied, 64).active == parameters(tied, 64).total
    assert flops_per_token(tied, 64, 8) == flops_per_token(apart, 64, 8)


def test_pipeline_cuts_do_not_change_the_counts() -> None:
    assert parameters(small("M-|*E"), 64) == parameters(small("M-*E"), 64)


def test_no_expert_bias_is_counted_where_it_never_moves() -> None:
    frozen = small("E", moe=dataclasses.replace(small("E").moe, bias_update_rate=0.0))
    assert parameters(small("E"), 64).total - parameters(frozen, 64).total == 8


def test_cache_of_nemotron_h_8b() -> None:
    cache = cache_size(PUBLISHED["Nemotron-H 8B"][0])
    assert cache.kv_per_token == 4 * 2 * 8 * 128 * 2  # layers, K and V, heads, width, bytes
    assert cache.ssm_per_sequence == 24 * 128 * 64 * 128 * 4
    assert cache.conv_per_sequence == 24 * 4 * (8192 + 2 * 8 * 128) * 2
    assert cache.of_sequence(10) - cache.of_sequence(9) == cache.kv_per_token


def test_counts_need_no_torch() -> None:
    # The launcher runs them on a login node. A fresh interpreter, since this one has torch.
    code = "import sys, hybrid_train.anatomy.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
