"""Dense models by their names: counted to the unit, and as transformers' own classes count them.

Source of the counts: the released files, or the same classes with the released settings; of the two
Puzzle models, whose class is not in transformers, the totals that were published.
"""

from typing import Any

import pytest
import torch
import transformers

from hybrid_train.anatomy.counts import parameters, tensors
from hybrid_train.anatomy.layers import main_layers
from hybrid_train.config.compose import compose
from hybrid_train.schema.model import Activation, Model, NormKind, RopeScaling

# name: parameters, without embedding and head, tensors of the file
COUNTS = {
    "llama3_1_8b": (8_030_261_248, 6_979_588_096, 291),
    "llama3_1_70b": (70_553_706_496, 68_452_360_192, 723),
    "llama3_2_1b": (1_235_814_400, 973_146_112, 146),
    "llama3_2_3b": (3_212_749_824, 2_818_747_392, 254),
    "llama3_1_minitron_4b_width": (4_512_746_496, 3_724_741_632, 291),
    "llama3_1_minitron_4b_depth": (4_540_469_248, 3_489_796_096, 147),
    "mistral_nemo_12b": (12_247_782_400, 10_905_605_120, 363),
    "mistral_nemo_minitron_8b": (8_414_105_600, 7_340_363_776, 363),
    "nemotron4_15b": (15_628_775_424, 12_483_047_424, 324),
    "nemotron4_340b": (341_029_195_776, 331_592_011_776, 964),
    "minitron_8b": (8_271_699_968, 6_174_547_968, 324),
    "minitron_4b": (4_190_509_056, 2_617_645_056, 324),
    "qwen2_5_0_5b": (494_032_768, 357_898_112, 290),
    "qwen2_5_1_5b": (1_543_714_304, 1_310_340_608, 338),
    "qwen2_5_3b": (3_085_938_688, 2_774_773_760, 434),
    "qwen2_5_7b": (7_615_616_512, 6_525_621_760, 339),
    "qwen2_5_14b": (14_770_033_664, 13_212_898_304, 579),
    "qwen3_0_6b": (596_049_920, 440_467_456, 310),
    "qwen3_1_7b": (1_720_574_976, 1_409_410_048, 310),
    "qwen3_4b": (4_022_468_096, 3_633_511_936, 398),
    "qwen3_8b": (8_190_735_360, 6_946_075_648, 399),
    "qwen3_14b": (14_768_307_200, 13_212_482_560, 443),
    "qwen3_32b": (32_762_123_264, 31_206_298_624, 707),
    "phi4_mini": (3_836_021_760, 3_221_425_152, 290),  # 194 there, where some are joined
    "nemotron_t_8b": (8_053_329_920, 6_979_588_096, 259),
    "llama3_3_nemotron_super_49b": (49_867_145_216, 47_765_798_912, 568),
    "llama3_1_nemotron_ultra_253b": (253_401_268_224, 249_198_575_616, 647),
}
# start of a name: theta, share of a head, scaling and its factor, norm_eps
POSITIONS: dict[str, tuple[float, float, RopeScaling, float | None, float]] = {
    "llama3_1_nemotron_ultra": (500_000, 1, RopeScaling.llama3, 16, 1e-5),
    "llama3_2": (500_000, 1, RopeScaling.llama3, 32, 1e-5),
    "llama3": (500_000, 1, RopeScaling.llama3, 8, 1e-5),
    "mistral": (1_000_000, 1, RopeScaling.none, None, 1e-5),
    "nemotron4": (10_000, 0.5, RopeScaling.none, None, 1e-5),
    "minitron": (10_000, 0.5, RopeScaling.none, None, 1e-5),
    "nemotron_t": (10_000, 1, RopeScaling.none, None, 1e-5),
    "qwen2_5_14b": (1_000_000, 1, RopeScaling.none, None, 1e-5),
    "qwen": (1_000_000, 1, RopeScaling.none, None, 1e-6),
    "phi4": (10_000, 0.75, RopeScaling.longrope, None, 1e-5),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "nemotron4": "Nemotron", "minitron": "Nemotron"}
CLASSES |= {"qwen2": "Qwen2", "qwen3": "Qwen3", "phi4": "Phi3"}
NOT_THERE = ("nemotron_t", "llama3_3_nemotron", "llama3_1_nemotron")  # in transformers


def model_of(name: str) -> Model:
    return compose("count", [f"model={name}"]).model


def of_family(table: dict[str, Any], name: str) -> Any:
    """Return what a table says of the start of a name; the first one that fits."""
    return next(value for start, value in table.items() if name.startswith(start))


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_its_parameters_to_the_unit(name: str) -> None:
    model = model_of(name)
    assert model.vocab_size is not None
    assert model.vocab_size % model.vocab_multiple == 0, "no rows are added"
    count = parameters(model, model.vocab_size)
    outer = count.by_kind["embedding"] + count.by_kind["head"]
    assert (count.total, count.total - outer, tensors(model).total) == COUNTS[name]


@pytest.mark.parametrize(
    "name", [name for name in COUNTS if not name.startswith((*NOT_THERE, "nemotron4_340b"))]
)
def test_a_model_has_the_parameters_and_tensors_of_its_class(name: str) -> None:
    model = model_of(name)
    family = of_family(CLASSES, name)
    config: Any = getattr(transformers, f"{family}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp.intermediate_size,
        num_hidden_layers=model.pattern.count("*-"),
        num_attention_heads=model.attention.heads,
        num_key_value_heads=model.attention.kv_heads,
        head_dim=model.attention.head_dim,
        tie_word_embeddings=model.tie_embeddings,
        pad_token_id=None,
    )
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    count = parameters(model, model.vocab_size or 0).total
    assert sum(one.numel() for one in theirs.parameters()) == count
    if family != "Phi3":
        assert len(list(theirs.parameters())) == tensors(model).total
    norm = "LayerNorm1P" if model.norm is NormKind.layer_1p else "RMSNorm"
    assert type(theirs.model.norm).__name__.endswith(norm)
    acts = {Activation.silu: "silu", Activation.squared_relu: "relu2"}
    assert acts[model.mlp.activation] == config.hidden_act


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_the_positions_of_its_family(name: str) -> None:
    model = model_of(name)
    theta, share, scaling, factor, eps = of_family(POSITIONS, name)
    rope = model.attention.rope
    assert (rope.theta, rope.fraction, rope.scaling) == (theta, share, scaling)
    assert factor is None or rope.factor == factor
    assert model.norm_eps == eps
    if scaling is RopeScaling.longrope:
        pairs = rope.turned(model.attention.head_dim) // 2
        assert len(rope.short_factors) == len(rope.long_factors) == pairs == 48
        assert rope.long_factors == sorted(rope.long_factors)


def test_nemotron4_15b_is_what_its_class_is_by_default() -> None:
    theirs, model = transformers.NemotronConfig(), model_of("nemotron4_15b")
    assert theirs.vocab_size == model.vocab_size
    assert (theirs.hidden_size, theirs.intermediate_size) == (6144, model.mlp.intermediate_size)
    assert (theirs.norm_eps, theirs.initializer_range) == (model.norm_eps, model.init_std)


def test_the_puzzle_models_have_their_published_widths() -> None:
    """FFN width = int(2 / 3 * multiple * hidden), to a multiple of 256; so in their config.json."""
    for name, total, blocks in (
        ("llama3_3_nemotron_super_49b", 1_642_496, (49, 80)),
        ("llama3_1_nemotron_ultra_253b", 4_327_168, (64, 81)),
    ):
        model = model_of(name)
        assert (model.pattern.count("*"), model.pattern.count("-")) == blocks
        widths = [one.sizes.ffn for one in main_layers(model) if one.letter == "-"]
        assert sum(widths) == total
        assert all(width % 256 == 0 for width in widths)


def test_a_gate_cannot_be_seen_in_a_count() -> None:
    """Two matrices of 21,504 are three of 14,336: blocks of Nemotron-T 8B and of Llama 3.1 8B."""
    ours, llama = model_of("nemotron_t_8b"), model_of("llama3_1_8b")
    assert COUNTS["nemotron_t_8b"][1] == COUNTS["llama3_1_8b"][1]
    assert (ours.mlp.gated, llama.mlp.gated) == (False, True)
