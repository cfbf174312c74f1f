"""What is exported has their names and comes back; tests/distributed lets Megatron-Core load it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import frozen
from hybrid_train.nvidia.checkpoint_folders import Trainer, look
from hybrid_train.nvidia.export_checkpoint import export_as
from hybrid_train.nvidia.import_checkpoint import import_checkpoint
from hybrid_train.nvidia.nemo_context import io_json
from hybrid_train.schema.model import LayerRule, Mamba, MlpSizes, Moe
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import tokens
from tests.core_save import ARGUMENTS
from tests.tiny import LENGTH, MEGATRON_WARNINGS, VOCAB, as_family, tiny_engine, tiny_job
from tests.unit.checkpoint.content import content_of, engine_of, take, weights_of

pytestmark = MEGATRON_WARNINGS
POSITION = {"step": 7, "tokens": 7 * 4 * LENGTH}


@pytest.fixture
def run(groups: Any, tmp_path: Path) -> tuple[Path, Any]:
    """A run folder with a checkpoint at step 7, and the engine that it is of."""
    from hybrid_train.checkpoint import store

    engine = engine_of(groups, seed=1, steps=1)
    store.save(tmp_path / "run", content_of(engine, groups), POSITION, keep=1)
    job = tiny_job(run_dir=str(tmp_path / "run"))
    job.model.vocab_size = VOCAB
    frozen.freeze(job, tmp_path / "run")
    return tmp_path / "run", engine


@pytest.mark.parametrize("trainer", Trainer, ids=lambda one: one.name)
def test_what_was_exported_comes_back(
    run: tuple[Path, Any], groups: Any, tmp_path: Path, trainer: Trainer
) -> None:
    _require_same(run, engine_of(groups, seed=2), groups, tmp_path, trainer)


@pytest.mark.parametrize("family", ["qwen", "nemotron"])
@pytest.mark.parametrize("trainer", Trainer, ids=lambda one: one.name)
def test_a_transformer_that_was_exported_comes_back(
    groups: Any, tmp_path: Path, family: str, trainer: Trainer
) -> None:
    from hybrid_train.checkpoint import store

    job = tiny_job("*-*-")
    as_family(job.model, family)
    job.model.mamba, job.model.moe = Mamba(), Moe()  # which no layer has, and no export says
    engine = tiny_engine(job, groups)
    take(engine, 1)
    store.save(tmp_path / "run", content_of(engine, groups), POSITION, keep=1)
    job.model.vocab_size, job.run_dir = VOCAB, str(tmp_path / "run")
    frozen.freeze(job, tmp_path / "run")
    job.train.seed += 1
    _require_same((tmp_path / "run", engine), tiny_engine(job, groups), groups, tmp_path, trainer)


def _require_same(
    run: tuple[Path, Any], other: Any, groups: Any, tmp_path: Path, trainer: Trainer
) -> None:
    """Export a run, import what came of it, and see that it is the same model."""
    from hybrid_train.checkpoint import layout
    from hybrid_train.checkpoint.save_load import read_weights

    export_as(run[0], tmp_path / "out", None, trainer)
    import_checkpoint(tmp_path / "out", tmp_path / "back", None, None)
    before, after = frozen.load(run[0]).model, frozen.load(tmp_path / "back").model
    before.init_std = after.init_std  # theirs says the number that ours leaves to the size
    assert after == before
    found = layout.locate(tmp_path / "back")
    assert found.position() == POSITION
    read_weights(found.path, other.network.chunks, groups)
    expected = weights_of(run[1])
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(other).items())


def test_weights_that_no_step_has_changed_are_a_release_for_megatron_lm(
    groups: Any, tmp_path: Path
) -> None:
    from hybrid_train.checkpoint import layout, store

    engine = engine_of(groups, seed=1)
    begin = {"step": 0, "tokens": 0}
    store.save(tmp_path / "run", content_of(engine, groups), begin, keep=1)
    job = tiny_job(run_dir=str(tmp_path / "run"))
    job.model.vocab_size = VOCAB
    frozen.freeze(job, tmp_path / "run")
    export_as(tmp_path / "run", tmp_path / "out", None, Trainer.megatron_lm)
    tracker = tmp_path / "out" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "release"
    assert {one.name for one in (tmp_path / "out").iterdir()} == {tracker.name, "release"}
    import_checkpoint(tmp_path / "out", tmp_path / "back", None, None)
    assert layout.locate(tmp_path / "back").position() == begin


def test_the_arguments_are_those_that_megatron_lm_reads(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    export_as(run[0], tmp_path / "out", None, Trainer.megatron_lm)
    found = look(tmp_path / "out")
    other = {"init_method_std", "consumed_train_samples", "hybrid_layer_pattern"}
    # Not of the model: `load_args_from_checkpoint` sets them all the same.
    other |= {"use_rotary_position_embeddings", "rotary_base", "rotary_percent"}
    assert {name: found.settings.get(name) for name in ARGUMENTS.keys() - other} == {
        name: value for name, value in ARGUMENTS.items() if name not in other
    }
    assert found.settings["hybrid_layer_pattern"] == "MEM*M-/*E/*E"
    assert (found.step, found.samples) == (7, 28)
    assert found.settings["no_save_optim"]  # or Megatron-LM asks for the optimizer's state
    assert found.settings["no_save_rng"]


def test_fields_are_those_of_transformer_config_and_of_the_hybrid(run: tuple[Path, Any]) -> None:
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import TransformerConfig

    from hybrid_train.nvidia.arguments import to_fields

    known = {one.name for one in fields(TransformerConfig)}
    # HybridModelProvider, Megatron-Bridge 067f987, models/hybrid/hybrid_provider.py
    known |= {
        "hybrid_layer_pattern", "make_vocab_size_divisible_by", "mamba_chunk_size",
        "position_embedding_type", "share_embeddings_and_output_weights",
    }  # fmt: skip
    assert to_fields(frozen.load(run[0]).model).keys() <= known


def test_every_module_that_may_ask_has_an_empty_state(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    export_as(run[0], tmp_path / "out", None, Trainer.megatron_lm)
    with StoredTensors(tmp_path / "out" / "iter_0000007", foreign=True) as stored:
        for module in (
            "decoder.layers.0.mixer.in_proj", "decoder.layers.0.mixer.out_proj",
            "decoder.layers.1.pre_mlp_layernorm", "decoder.layers.1.mlp.fc1_latent_proj",
            "decoder.layers.3.self_attention.core_attention", "decoder.layers.5.mlp.linear_fc1",
            "decoder.final_norm", "output_layer", "mtp.layers.0.eh_proj",
        ):  # fmt: skip
            assert stored.saved(f"{module}._extra_state/shard_0_1") is not None, module
        experts = "decoder.layers.1.mlp.experts.experts.linear_fc2._extra_state"
        assert all(stored.saved(f"{experts}/shard_{expert}_4") for expert in range(4))


def test_nemo_finds_the_settings_of_model_yaml_in_io_json_too(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    export_as(run[0], tmp_path / "out", None, Trainer.nemo)
    context = tmp_path / "out" / "context"
    model = yaml.safe_load((context / "model.yaml").read_text())
    assert json.loads((context / "io.json").read_text()) == io_json(model)


def test_layers_of_sizes_of_their_own_are_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    job = frozen.load(run[0])
    rule = LayerRule(layers="6", mlp=MlpSizes(intermediate_size=32))
    job.model.layers.append(rule)
    (run[0] / "config.yaml").unlink()
    frozen.freeze(job, run[0])
    with pytest.raises(UserError, match=r"model.layers.0 gives layer 6 sizes of its own"):
        export_as(run[0], tmp_path / "out", None, Trainer.bridge)
    assert not (tmp_path / "out").exists()


def test_the_counters_of_bridge_are_read_by_torch_alone(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    export_as(run[0], tmp_path / "out", None, Trainer.bridge)
    state = torch.load(tmp_path / "out" / "latest_train_state.pt", weights_only=True)
    assert {name: one.item() for name, one in state.items() if "samples" in name} == {
        "consumed_train_samples": 28, "skipped_train_samples": 0, "consumed_valid_samples": 0,
    }  # fmt: skip
    assert state["step"] == 7
    found = look(tmp_path / "out")
    assert (found.trainer, found.samples, found.step) == (Trainer.bridge, 28, 7)
    assert tokens(str(POSITION["tokens"])) == found.samples * LENGTH
