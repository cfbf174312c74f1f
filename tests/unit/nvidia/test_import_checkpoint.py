"""What Megatron-Core's own save wrote for Megatron-LM is imported, and goes on as if never left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import frozen
from hybrid_train.nvidia.import_checkpoint import import_checkpoint
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import UserError
from tests.core_save import (
    NEMO_PATTERN,
    SAMPLES,
    STEP,
    save_as_bridge,
    save_as_megatron_lm,
    save_as_nemo,
)
from tests.tiny import LENGTH, MEGATRON_WARNINGS
from tests.unit.checkpoint.content import content_of, engine_of, moments_of, take, weights_of

pytestmark = MEGATRON_WARNINGS


def loaded_into(engine: Any, groups: Any, run_dir: Path) -> Any:
    """Load all that an imported run folder holds; return its position."""
    from hybrid_train.checkpoint import store

    found = layout.latest(run_dir)
    assert found is not None
    return store.load(found, content_of(engine, groups))


def test_a_run_of_megatron_lm_goes_on_to_the_bit(groups: Any, tmp_path: Path) -> None:
    theirs = engine_of(groups, seed=1, steps=STEP)
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    ours = engine_of(groups, seed=2)
    position = loaded_into(ours, groups, tmp_path / "run")
    assert position == {"step": STEP, "tokens": SAMPLES * LENGTH}
    assert all(value.item() == STEP for name, value in moments_of(ours) if name == "step")
    assert take(ours, 3) == take(theirs, 3)
    expected = weights_of(theirs)
    assert any(value.any() for name, value in expected.items() if "expert_bias" in name)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(ours).items())


def test_a_run_in_bfloat16_goes_on_with_its_masters(groups: Any, tmp_path: Path) -> None:
    # Without Mamba layers, whose float32 parameters core's own optimizer state cannot be beside.
    half = {"pattern": "*E-", "format": GemmFormat.bf16}
    theirs = engine_of(groups, seed=1, steps=STEP, **half)
    changed = {"hybrid_layer_pattern": "*E-", "num_layers": 3, "mtp_num_layers": None}
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs", **changed)
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    ours = engine_of(groups, seed=2, **half)
    loaded_into(ours, groups, tmp_path / "run")
    assert take(ours, 3) == take(theirs, 3)
    job = frozen.load(tmp_path / "run")
    assert job.precision.format is GemmFormat.bf16


def test_a_run_of_megatron_bridge_goes_on_to_the_bit(groups: Any, tmp_path: Path) -> None:
    theirs = engine_of(groups, seed=1, steps=STEP)
    save_as_bridge(theirs, groups, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    ours = engine_of(groups, seed=2)
    position = loaded_into(ours, groups, tmp_path / "run")
    assert position == {"step": STEP, "tokens": SAMPLES * LENGTH}
    assert take(ours, 3) == take(theirs, 3)


def test_a_run_of_nemo_goes_on_to_the_bit(groups: Any, tmp_path: Path) -> None:
    theirs = engine_of(groups, seed=1, steps=STEP, split=False, pattern=NEMO_PATTERN)
    save_as_nemo(theirs, groups, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    ours = engine_of(groups, seed=2, split=False, pattern=NEMO_PATTERN)
    position = loaded_into(ours, groups, tmp_path / "run")
    assert position == {"step": STEP, "tokens": SAMPLES * LENGTH}
    assert take(ours, 3) == take(theirs, 3)
    assert frozen.load(tmp_path / "run").model.vocab_size == 64  # all rows: nobody says how many


@pytest.fixture
def half(groups: Any, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder with every weight in bfloat16, as theirs are, and their masters by name."""
    from hybrid_train.checkpoint.shards import bare

    engine = engine_of(groups, seed=1, steps=STEP)
    masters = weights_of(engine)
    network = engine.network
    for parameter in bare(network.chunks[0]).parameters():
        parameter.data = parameter.data.bfloat16()  # what the optimizer updates stays as it is
    save_as_megatron_lm(engine, groups, tmp_path / "theirs")
    return tmp_path / "theirs", masters


def test_weights_that_stay_in_float32_are_those_of_the_masters(
    half: tuple[Path, dict[str, Tensor]], groups: Any, tmp_path: Path
) -> None:
    import_checkpoint(half[0], tmp_path / "run", None, None)
    ours = engine_of(groups, seed=2, format=GemmFormat.bf16)
    loaded_into(ours, groups, tmp_path / "run")
    for name, value in weights_of(ours).items():
        assert torch.equal(value, half[1][name].to(value.dtype)), name
    with StoredTensors(layout.locate(tmp_path / "run").path) as stored:
        rates = stored.read("decoder.layers.0.mixer.A_log", 0, 4)
        head = stored.read("optimizer.master.output_layer.weight", 0, 64)
        assert stored.dtype("output_layer.weight") == torch.bfloat16
    assert torch.equal(rates, half[1]["decoder.layers.0.mixer.A_log"])
    assert not torch.equal(rates, rates.bfloat16().float())
    assert torch.equal(head, half[1]["output_layer.weight"])


def test_weights_in_float32_are_the_masters_and_leave_none(
    half: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    import_checkpoint(half[0], tmp_path / "run", torch.float32, None)
    with StoredTensors(layout.locate(tmp_path / "run").path) as stored:
        assert not any(name.startswith("optimizer.master.") for name in stored.names)
        head = stored.read("output_layer.weight", 0, 64)
    assert torch.equal(head, half[1]["output_layer.weight"])


def test_the_model_of_the_arguments_is_that_of_the_run(groups: Any, tmp_path: Path) -> None:
    theirs = engine_of(groups, seed=1)
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    expected = theirs.network.chunks[0].module
    model = frozen.load(tmp_path / "run").model
    assert model.pattern == "MEM*M-/*E/*E"
    assert model.vocab_size == 61
    assert (model.hidden_size, model.mamba.state_size) == (expected.config.hidden_size, 8)


def test_state_by_rank_stays_behind_and_is_said(
    groups: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = engine_of(groups, seed=1, steps=STEP)
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs", sharding="dp_reshardable")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    assert '"dp_reshardable", which only the same layout can read' in caplog.text
    ours = engine_of(groups, seed=2)
    with pytest.raises(UserError, match="holds no optimizer state that this version reads"):
        loaded_into(ours, groups, tmp_path / "run")
    from hybrid_train.checkpoint.save_load import read_weights

    read_weights(layout.locate(tmp_path / "run").path, ours.network.chunks, groups)
    expected = weights_of(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(ours).items())


def test_state_at_a_wrong_place_is_found(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As core writes it behind a padded bucket (Megatron-LM#5077)."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    gathered = DistributedOptimizer.get_parameter_state_dp_zero

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = gathered(self, *args, **kwargs)
        for tensors in state[0].values():
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                tensors[kind] = tensors[kind].roll(64)
        return state

    monkeypatch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", shifted)
    theirs = engine_of(groups, seed=1, steps=STEP)
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    assert "is not the master of its weight" in caplog.text
    from hybrid_train.checkpoint.save_load import read_weights

    ours = engine_of(groups, seed=2)
    read_weights(layout.locate(tmp_path / "run").path, ours.network.chunks, groups)
    expected = weights_of(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(ours).items())


def test_a_model_without_expert_biases_gets_biases_that_stay_zero(
    groups: Any, tmp_path: Path
) -> None:
    from hybrid_train.checkpoint.shards import bare

    theirs = engine_of(groups, seed=1)
    model = bare(theirs.network.chunks[0])
    for module in model.modules():  # as core does where moe_router_enable_expert_bias is off
        if "expert_bias" in module._buffers:
            module._non_persistent_buffers_set.add("expert_bias")
    save_as_megatron_lm(theirs, groups, tmp_path / "theirs", moe_router_enable_expert_bias=False)
    import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    assert frozen.load(tmp_path / "run").model.moe.bias_update_rate == 0
    with StoredTensors(layout.locate(tmp_path / "run").path) as stored:
        assert not stored.read("decoder.layers.1.mlp.router.expert_bias", 0, 4).any()


def test_a_model_that_is_not_ours_is_refused_before_anything_is_written(
    groups: Any, tmp_path: Path
) -> None:
    engine = engine_of(groups, seed=1)
    save_as_megatron_lm(
        engine, groups, tmp_path / "theirs", squared_relu=False, position_embedding_type="yarn"
    )
    with pytest.raises(UserError, match="position_embedding_type is 'yarn'") as error:
        import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    assert "squared_relu is not set" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_weights_that_the_arguments_do_not_name_are_refused(groups: Any, tmp_path: Path) -> None:
    engine = engine_of(groups, seed=1)
    save_as_megatron_lm(engine, groups, tmp_path / "theirs", moe_latent_size=None)
    with pytest.raises(UserError, match="asks for"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "run", None, None)
    assert not (tmp_path / "run").exists()
