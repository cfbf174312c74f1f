"""Planted NaN and infinity are found where they were planted, and change nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.schema.checkpoint import Recovery
from hybrid_train.training.bad_steps import BadSteps
from tests.masking import FreezeEmbedding
from tests.tiny import MEGATRON_WARNINGS, microbatches, some_rows, tiny_engine, tiny_job

pytestmark = MEGATRON_WARNINGS


def state_of(engine: Any) -> dict[str, Tensor]:
    state = engine.network.chunks[0].module.state_dict()
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def assert_unchanged(engine: Any, before: dict[str, Tensor]) -> None:
    for name, value in state_of(engine).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def engine_after_one_step(groups: Any, clip: float = 1.0) -> Any:
    job = tiny_job("MEM*M-/*E")
    job.optimizer.clip_grad_norm = clip
    engine = tiny_engine(job, groups)
    engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    return engine


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("decoder.layers.2.mixer.out_proj.weight", "decoder.layers.2.mixer.out_proj"),
        ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.self_attention"),
        ("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", "decoder.layers.1.mlp"),
        ("mtp.layers.0.eh_proj.weight", "mtp.layers.0.eh_proj"),
        ("output_layer.weight", "output_layer (its weight not finite)"),
    ],
)
def test_nan_in_a_weight_is_located_and_nothing_is_updated(
    groups: Any, parameter: str, module: str
) -> None:
    from hybrid_train.training.bad_steps import NonFiniteError

    engine = engine_after_one_step(groups)
    engine.network.chunks[0].module.get_parameter(parameter).data.view(-1)[3] = float("nan")
    before = state_of(engine)
    with pytest.raises(NonFiniteError) as error:
        engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    assert "step 2: " in str(error.value)
    assert f"forward pass on rank 0, module {module}" in str(error.value)
    assert_unchanged(engine, before)


@pytest.mark.parametrize("clip", [1.0, 0.0], ids="clip={}".format)
def test_infinite_gradient_is_located_and_nothing_is_updated(groups: Any, clip: float) -> None:
    from hybrid_train.training.bad_steps import NonFiniteError

    engine = engine_after_one_step(groups, clip)
    # No linear layer: these add to the gradient buffer themselves, where no hook looks.
    name = "decoder.layers.4.mixer.in_proj.layer_norm_weight"
    weight = engine.network.chunks[0].module.get_parameter(name)
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    before = state_of(engine)
    with pytest.raises(NonFiniteError) as error:
        engine.step(microbatches(some_rows(), 2), tokens_seen=0)
    assert "step 2: the gradient norm is" in str(error.value)
    assert f"backward pass on rank 0, parameter {name}" in str(error.value)
    assert_unchanged(engine, before)
    handle.remove()
    engine.step(microbatches(some_rows(), 2), tokens_seen=0)  # and training could go on


def test_the_sound_run_raises_nothing_and_leaves_no_hooks(groups: Any) -> None:
    from hybrid_train.training.bad_steps import first_bad_module

    engine = engine_after_one_step(groups)
    batches = [next(microbatches(some_rows(), 2))]
    found = first_bad_module(
        engine.network.chunks, lambda: engine.forward_only(engine.objective.turns[0], batches)
    )
    assert found == "the forward pass, repeated, does not show it"
    assert not any(module._forward_hooks for module in engine.network.chunks[0].module.modules())


def test_frozen_parameters_have_no_gradient_to_look_at(groups: Any) -> None:
    job = tiny_job("M*-")
    job.edits = [FreezeEmbedding()]
    engine = tiny_engine(job, groups)
    before = state_of(engine)
    first = next(one for one in engine.network.chunks[0].parameters() if one.requires_grad)
    with torch.no_grad():
        first.view(-1)[0] = float("nan")
    skipping = BadSteps(Recovery(skip_nonfinite=True))
    report = engine.step(microbatches(some_rows(), 2), tokens_seen=0, bad_steps=skipping)
    assert report.skipped_kind == "nonfinite"
    name = "embedding.word_embeddings.weight"
    assert torch.equal(state_of(engine)[name], before[name])
