"""The models of a study of architecture are as equal as its file says."""

import itertools

import pytest

from hybrid_train.anatomy.counts import flops_per_token, parameters
from hybrid_train.config.compose import compose
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.study import StudyJob

EQUAL_PARAMETERS, EQUAL_FLOPS = 0.01, 0.02  # shares
LENGTH = 256  # tokens of a row


def counts(study: str, variant: str) -> tuple[int, int]:
    """Parameters, and FLOPs of a token forward, of the model that a variant trains."""
    job = compose("study", [f"name={study}"])
    assert isinstance(job, StudyJob)
    lines = job.variants[variant].overrides
    starts = [name for name in job.stages if f"checkpoint.load={{{name}}}" in lines]
    if starts:  # it takes the model of its stage
        base = [one for one in job.stages[starts[0]].overrides if "{" not in one]
        lines = [one for one in lines if one.startswith("model.")]
    else:
        base = job.base
    model = compose("train", [*base, *lines]).model
    vocabulary = padded_vocab_size(model.vocab_size or 0, model.vocab_multiple)
    flops = flops_per_token(model, vocabulary, LENGTH).forward
    return parameters(model, vocabulary).total, flops


def apart(one: float, other: float) -> float:
    return abs(one / other - 1)


@pytest.mark.parametrize(
    ("study", "variants"),
    [
        ("hybrid_against_transformer", ["transformer", "hybrid", "hybrid_rope", "mamba"]),
        ("latent_moe", ["moe", "latent", "latent_wide", "dense_large"]),
        ("long_context", ["hybrid", "hybrid_long", "transformer", "transformer_long"]),
        ("long_context", ["transformer", "transformer_slow"]),
    ],
)
def test_models_that_are_called_equal_have_equal_parameters(
    study: str, variants: list[str]
) -> None:
    for one, other in itertools.combinations(variants, 2):
        assert apart(counts(study, one)[0], counts(study, other)[0]) < EQUAL_PARAMETERS


@pytest.mark.parametrize("variant", ["latent", "latent_many", "dense"])
def test_experts_of_equal_cost_have_equal_flops(variant: str) -> None:
    assert apart(counts("latent_moe", variant)[1], counts("latent_moe", "moe")[1]) < EQUAL_FLOPS


def test_mtp_adds_to_a_model_that_is_otherwise_the_same() -> None:
    job = compose("study", ["name=mtp"])
    assert isinstance(job, StudyJob)
    models = {
        name: compose("train", [*job.base, *one.overrides]).model
        for name, one in job.variants.items()
    }
    plain = models["off"]
    for model in models.values():
        main, *_ = model.pattern.split("/")
        assert main == plain.pattern
        for section in ("hidden_size", "attention", "mamba", "mlp", "moe"):
            assert getattr(model, section) == getattr(plain, section)


def test_the_long_context_study_starts_from_the_models_of_the_other() -> None:
    both = ("hybrid_against_transformer", "long_context")
    for variant in ("hybrid", "transformer"):
        assert len({counts(study, variant) for study in both}) == 1
