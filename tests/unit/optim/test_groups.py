"""Every parameter is in the group that its kind asks for."""

from typing import Any

import pytest

from hybrid_train.optim.groups import PATTERNS, describe, kind_of
from hybrid_train.schema.optimizer import AdamW, ParameterKind
from hybrid_train.schema.parallel import Parallel
from tests.tiny import MEGATRON_WARNINGS, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS
STAY = ("norm.weight", "layer_norm_weight", "bias", "A_log", "D", "dt_bias")  # ends of names
MATRICES = (
    "word_embeddings.weight", "output_layer.weight", "conv1d_weight", "in_proj.weight",
    "out_proj.weight", "linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight",
    "linear_fc2.weight", "router.weight", "latent_proj.weight", "eh_proj.weight",
    *(f"linear_fc{n}.weight{expert}" for n in (1, 2) for expert in range(4)),
)  # fmt: skip


def wanted_decay(name: str) -> float:
    stays, decays = name.endswith(STAY), name.endswith(MATRICES)
    assert stays != decays, f"{name}: the test does not know it"
    return 0.0 if stays else 0.1


def held(engine: Any) -> list[tuple[str, Any]]:
    return list(engine.network.chunks[0].named_parameters())


def decay_of_each(engine: Any) -> dict[str, float]:
    """Weight decay by name, as the optimizer's own groups have it; whole parameters only."""
    rates = {
        id(parameter): group["weight_decay"]
        for group in engine.network.optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: rates[id(parameter)] for name, parameter in held(engine)}


def test_the_default_leaves_norms_biases_and_mamba_scalars_alone(groups: Any) -> None:
    engine = tiny_engine(tiny_job(parallel=Parallel(distributed_optimizer=False)), groups)
    found = decay_of_each(engine)
    assert found == {name: wanted_decay(name) for name in found}
    assert set(found.values()) == {0.0, 0.1}


def test_the_default_is_the_rule_of_megatron(groups: Any) -> None:
    """Core decays what has two axes or more, unless it is a bias."""
    for name, parameter in held(tiny_engine(tiny_job(), groups)):
        rule = parameter.dim() == 1 or name.endswith(".bias")
        assert (kind_of(name) in AdamW().no_decay) == rule, name


@pytest.mark.parametrize("kind", ParameterKind)
def test_each_kind_alone_can_be_left_out(groups: Any, kind: ParameterKind) -> None:
    job = tiny_job(parallel=Parallel(distributed_optimizer=False))
    job.optimizer.no_decay = [kind]
    found = decay_of_each(tiny_engine(job, groups))
    still = {name for name, decay in found.items() if decay == 0.0}
    assert still == {name for name in found if kind_of(name) is kind}
    assert still


def test_with_no_rule_everything_decays(groups: Any) -> None:
    job = tiny_job(parallel=Parallel(distributed_optimizer=False))
    job.optimizer.no_decay = []
    assert set(decay_of_each(tiny_engine(job, groups)).values()) == {0.1}


def test_no_parameter_is_of_two_kinds(groups: Any) -> None:
    for name, _ in held(tiny_engine(tiny_job(), groups)):
        kinds = [kind for kind in PATTERNS if kind_of_one(name, kind)]
        assert len(kinds) <= 1, (name, kinds)


def kind_of_one(name: str, kind: ParameterKind) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for pattern in PATTERNS[kind])


def test_the_log_counts_what_decays_and_what_does_not(groups: Any) -> None:
    engine = tiny_engine(tiny_job("M"), groups)
    # 64 rows of 32 twice; in_proj 32 -> 64 z + 64 x + 2 * 16 of B and C + 4 dt, out_proj, conv1d
    # with 96 channels and 4 taps; norms of 32 twice and of 64 inside; 4 heads.
    decaying = 2 * 64 * 32 + 32 * (64 + 64 + 32 + 4) + 64 * 32 + 96 * 4
    total = decaying + (32 + 32 + 64) + 96 + 3 * 4
    assert (decaying, total) == (11776, 12012)
    assert describe(AdamW(), held(engine)) == (
        "weight decay 0.1 on 11.8k of 12k parameters of this process; not on norms (128), "
        "biases (96), A_log (4), D (4), dt_bias (4)"
    )
