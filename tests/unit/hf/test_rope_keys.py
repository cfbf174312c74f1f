"""Keys of rotary embeddings: both spellings, contradictions, and the errors that nobody sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid_train.hf import config_json
from hybrid_train.ops.rope import frequencies
from hybrid_train.schema.model import Model, Rope, RopeScaling
from hybrid_train.schema.problems import UserError

PATH = Path("config.json")
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LONG = {"short_factor": [1.0] * 24, "long_factor": [2.0 + n for n in range(24)]}
SIZES = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 61}


def llama(**keys: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, "max_position_embeddings": 131072, **keys}


def phi(**keys: Any) -> dict[str, Any]:
    """Phi-4-mini's shares: 48 of 64 channels are turned, from 4096 tokens to 131,072."""
    return {
        "model_type": "phi3",
        **SIZES,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **LONG},
        **keys,
    }


def rope_of(config: dict[str, Any]) -> Rope:
    return config_json.to_model(config, PATH).attention.rope


@pytest.mark.parametrize(
    "config",
    [
        llama(rope_theta=5e5, rope_scaling=LLAMA3),
        llama(rope_parameters={**LLAMA3, "rope_theta": 500000}),
        llama(rope_theta=5e5, rope_scaling={**LLAMA3, "type": "llama3"}),
        llama(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    ],
    ids=["transformers 4", "transformers 5", "type", "both"],
)
def test_every_spelling_of_llama3_is_read(config: dict[str, Any]) -> None:
    assert rope_of(config) == Rope(
        theta=5e5, scaling=RopeScaling.llama3, original_length=8192, factor=32.0,
        low_frequency_factor=1.0, high_frequency_factor=4.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_scaling": {"type": "su", **LONG}},
        {"rope_scaling": {"rope_type": "longrope", **LONG, "factor": 32.0}},
        {
            "rope_scaling": None,
            "partial_rotary_factor": None,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096, **LONG,
            },
        },
    ],
    ids=["type", "su", "factor", "transformers 5"],
)  # fmt: skip
def test_every_spelling_of_longrope_is_read(keys: dict[str, Any]) -> None:
    assert rope_of(phi(**keys)) == Rope(
        theta=10000.0, fraction=0.75, scaling=RopeScaling.longrope, original_length=4096,
        maximum_length=131072, short_factors=LONG["short_factor"],
        long_factors=LONG["long_factor"],
    )  # fmt: skip


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_percent", "rope_percentage"])
def test_every_name_of_the_share_that_is_turned_is_read(key: str) -> None:
    config = {"model_type": "nemotron", **SIZES}
    assert rope_of(config).fraction == 0.5  # of the class, where no key says it
    assert rope_of(config | {key: 0.25}).fraction == 0.25


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling.type is 'yarn'"),
        (llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.type is 'dynamic'"),
        (llama(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type is 'linear'"),
        (llama(rope_parameters={"rope_type": "proportional"}), "rope_parameters.rope_type is"),
        (llama(rope_scaling={"rope_type": "default", "factor": 8.0}), "factor is 8.0, which means"),
        (llama(rope_scaling={**LLAMA3, "beta_fast": 32}), "rope_scaling.beta_fast is 32"),
        (llama(rope_scaling={**LLAMA3, "factor": None}), "factor is None; it must be a number"),
        (llama(rope_scaling={**LLAMA3, "factor": 0.5}), "factor"),
        (llama(rope_scaling={**LLAMA3, "low_freq_factor": 4.0}), "low_frequency_factor = 4.0"),
        (llama(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta is 10000.0, and"),
        (
            llama(rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "factor": 8.0}),
            "rope_scaling.factor is 32.0, and rope_parameters.factor 8.0",
        ),
        (llama(rope_scaling="llama3"), "rope_scaling is 'llama3'; it must be a table"),
        (llama(rope_theta="10k"), "rope_theta is '10k'"),
        (llama(rope_theta=True), "rope_theta is True"),
        (llama(partial_rotary_factor=0.5), "it turns whole heads"),
        (llama(rotary_interleaved=True), "rotary_interleaved is True; channels are turned as two"),
        (phi(rope_percent=0.5), "rope_percent is 0.5, and partial_rotary_factor 0.75"),
        (phi(partial_rotary_factor=0.7), "22 pairs of channels are turned"),
        (phi(rope_scaling={"type": "su", **LONG, "long_mscale": 1.2}), "long_mscale is 1.2"),
        (phi(rope_scaling={"type": "su", **LONG, "attention_factor": 1.0}), "attention_factor is"),
        (phi(original_max_position_embeddings="4k"), "original_max_position_embeddings is '4k'"),
        (phi(rope_scaling=LLAMA3, original_max_position_embeddings=8192), "has no such scaling"),
        (phi(partial_rotary_factor=0.33), "21 of 64 channels of a head are turned"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_json.to_model(config, PATH)
    assert message in str(error.value)


@pytest.mark.parametrize("pairs", [16, 32], ids=["fewer", "half of the head"])
def test_longrope_needs_a_factor_for_each_pair_that_is_turned(pairs: int) -> None:
    factors = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    with pytest.raises(UserError, match=f"short_factor has {pairs} numbers; 24 pairs"):
        rope_of(phi(rope_scaling={"type": "longrope", **factors}))


def test_phi_without_the_original_length_at_the_top_has_that_of_its_class() -> None:
    config = phi(rope_scaling={"type": "su", **LONG, "original_max_position_embeddings": 2048})
    del config["original_max_position_embeddings"]
    with pytest.raises(UserError, match="original_max_position_embeddings is 4096, and rope_sca"):
        rope_of(config)
    del config["rope_scaling"]["original_max_position_embeddings"]
    assert rope_of(config).original_length == 4096


def theirs(rope: Rope, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies and growth of transformers, of the config that we write for a model."""
    model = Model(pattern="*-", hidden_size=64, vocab_size=61)
    model.attention.heads = model.attention.kv_heads = 1
    model.attention.head_dim, model.attention.rope = 64, rope
    family = config_json.LLAMA if rope.fraction == 1 else config_json.PHI3
    made = family.to_config(model, vocab_size=61, length=512, dtype="float32", token_ids={})
    config = getattr(transformers, family.architecture).config_class(**made)
    compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    return compute(config, device=None, seq_len=length)  # type: ignore[no-any-return]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_transformers_has_our_angles_at_position_8000_for_either_factor(factor: float) -> None:
    """They are 0.8 rad apart there and equal at the first positions."""
    ropes = {
        one: Rope(theta=5e5, scaling=RopeScaling.llama3, original_length=8192, factor=one)
        for one in (8.0, 32.0)
    }
    found, _ = theirs(ropes[factor], 8001)
    apart = 8000 * (found - frequencies(ropes[factor], 64, 8001)).abs().max()
    other = 8000 * (found - frequencies(ropes[40.0 - factor], 64, 8001)).abs().max()
    assert apart < 1e-3
    assert other > 0.5


@pytest.mark.parametrize("length", [4096, 4097])
def test_transformers_has_our_angles_and_growth_of_longrope(length: int) -> None:
    rope = rope_of(phi())
    found, growth = theirs(rope, length)
    torch.testing.assert_close(found, frequencies(rope, 64, length))
    assert growth == pytest.approx(rope.magnitude)
    assert growth > 1.1


@pytest.mark.parametrize("name", ["llama", "longrope of llama", "phi3", "nemotron"])
def test_what_is_written_is_read_again_in_each_spelling_alone(name: str) -> None:
    configs = {
        "llama": llama(rope_theta=5e5, rope_scaling=LLAMA3),
        "longrope of llama": llama(
            rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 32,
                          "long_factor": [3.0] * 32, "factor": 2.5,
                          "original_max_position_embeddings": 4096}
        ),
        "phi3": phi(),
        "nemotron": {"model_type": "nemotron", **SIZES, "partial_rotary_factor": 0.75},
    }  # fmt: skip
    model = config_json.to_model(configs[name], PATH)
    family = config_json.family_of(configs[name])
    made = family.to_config(model, vocab_size=61, length=512, dtype="float32", token_ids={})
    rope, older = model.attention.rope, {k: v for k, v in made.items() if k != "rope_parameters"}
    newer = {k: v for k, v in made.items() if k not in ("rope_scaling", "rope_theta")}
    newer.pop("partial_rotary_factor", None)
    for config in (made, older, newer):
        assert config_json.to_model(config, PATH).attention.rope == rope
