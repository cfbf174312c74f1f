"""Exports of models whose layers differ, and what family a model of ours becomes."""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.config import frozen
from hybrid_train.hf.read import Folder, import_folder, imported_job
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.convert import differences
from hybrid_train.schema.model import (
    Activation,
    LayerRule,
    MlpSizes,
    Model,
    MoeSizes,
    Rope,
    RopeScaling,
)
from hybrid_train.schema.problems import UserError
from tests.dense_folders import folder_of
from tests.hf_folders import VOCAB, tokens_of
from tests.random_checkpoints import random_tensors, write_checkpoint
from tests.tiny import MEGATRON_WARNINGS, RUNTIME, as_family, tiny_job

pytestmark = MEGATRON_WARNINGS
HUGE = 2**40  # bytes of a file: one file for all
SHARE = 1e-4  # of the standard deviation of the logits
TOKENS = 100_000


def weights_of(model: Model, rows: int = 64) -> dict[str, Tensor]:
    """Random weights, matrices small enough that no softmax is sharp."""
    tensors = random_tensors(model, rows, seed=1)
    return {name: value * (0.3 if value.dim() > 1 else 1) for name, value in tensors.items()}


def run_of(model: Model, run_dir: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a run folder of random weights."""
    model.vocab_size = VOCAB
    rows = -(-VOCAB // model.vocab_multiple) * model.vocab_multiple
    write_checkpoint(run_dir, weights_of(model, rows) if tensors is None else tensors)
    frozen.freeze(imported_job(model, run_dir, 64, torch.float32), run_dir)
    return run_dir


def tiny(pattern: str, family: str = "hybrid", *rules: LayerRule) -> Model:
    model = tiny_job(pattern).model
    if family != "hybrid":
        as_family(model, family)
        model.attention.rope.fraction = 1.0 if family != "nemotron" else 0.5
    model.layers = list(rules)
    return model


def our_logits(groups: Any, run_dir: Path, tokens: Tensor) -> Tensor:
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.model.build import build_model

    checkpoint = open_checkpoint(run_dir)
    checkpoint.job.runtime = RUNTIME
    model = build_model(checkpoint.job, groups, VOCAB, on_gpu=False).chunks[0].eval()
    read_weights(checkpoint.found.path, [model], groups)
    with torch.no_grad():
        return model(tokens).logits()[..., :VOCAB]


def loaded(folder: Path) -> Any:
    from hybrid_train.hf import config_json

    model = config_json.to_model(config_json.read_config(folder), folder / "config.json")
    return load_theirs(folder, model)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_mlps_of_other_widths_are_filled_up_and_compute_the_same(
    groups: Any, family: str, tmp_path: Path
) -> None:
    rule = LayerRule(layers="2", mlp=MlpSizes(intermediate_size=24))
    run = run_of(tiny("*-*-", family, rule), tmp_path / "run")
    export_checkpoint(run, tmp_path / "out", None, HUGE)
    tokens = tokens_of(40)
    expected = our_logits(groups, run, tokens)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(tokens, use_cache=False).logits
    assert (found - expected).abs().max() < SHARE * expected.std()
    checkpoint = open_checkpoint(run)
    with StoredTensors(checkpoint.found.path) as stored, Folder(tmp_path / "out") as folder:
        assert not differences(checkpoint, Weights(stored, best=False), folder).lines()


def count(chosen: Tensor, _: Any, __: Any, made: tuple[Tensor, ...]) -> None:
    """Add how often each expert was chosen by a router."""
    chosen += made[2].flatten().bincount(minlength=4)


def test_experts_that_are_filled_in_are_never_chosen(groups: Any, tmp_path: Path) -> None:
    """Of 100,000 tokens; those that are there are chosen with scores down to nothing."""
    model = tiny("*E-E", "hybrid", LayerRule(layers="2", moe=MoeSizes(experts=3)))
    tensors = weights_of(model)
    for name, value in tensors.items():
        if name.endswith("expert_bias"):
            value.uniform_(-1.5, -0.5)  # below the scores of those that are filled in, 0.5 of zeros
    run = run_of(model, tmp_path / "run", tensors)
    export_checkpoint(run, tmp_path / "out", None, HUGE)
    theirs, chosen = loaded(tmp_path / "out"), {}
    for name, module in theirs.named_modules():
        if name.endswith(".gate"):
            chosen[name] = torch.zeros(4, dtype=torch.int64)
            module.register_forward_hook(functools.partial(count, chosen[name]))
    for seed in range(TOKENS // 10_000):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            theirs(torch.randint(VOCAB, (100, 100), generator=generator), use_cache=False)
    narrow, wide = chosen.values()
    assert narrow.sum() == wide.sum() == 2 * TOKENS
    assert narrow[3] == 0
    assert (narrow[:3] > 0).all()
    assert (wide > 0).all()
    tokens = tokens_of(40)
    with torch.no_grad():
        found = theirs(tokens, use_cache=False).logits
    expected = our_logits(groups, run, tokens)
    assert (found - expected).abs().max() < SHARE * expected.std()


def test_a_bias_as_low_as_that_of_experts_that_are_filled_in_is_refused(tmp_path: Path) -> None:
    model = tiny("*E-E", "hybrid", LayerRule(layers="2", moe=MoeSizes(experts=3)))
    tensors = weights_of(model)
    tensors["decoder.layers.1.mlp.router.expert_bias"][1] = -20000
    run = run_of(model, tmp_path / "run", tensors)
    with pytest.raises(UserError, match=r"expert_bias holds -20000: .* -10000"):
        export_checkpoint(run, tmp_path / "out", None, HUGE)
    assert not (tmp_path / "out").exists()


def test_a_trained_model_keeps_the_family_and_the_keys_of_its_folder(tmp_path: Path) -> None:
    source = folder_of("mistral", 1, tmp_path / "hf")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auth": "a lab"}))
    import_folder(source, tmp_path / "run", None)
    job = frozen.load(tmp_path / "run")
    job.model.attention.rope.theta = 77.0
    frozen.freeze(job, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["model_type"], said["auth"], said["rope_theta"]) == ("mistral", "a lab", 77.0)
    assert said["rope_parameters"]["rope_theta"] == 77.0


def test_a_family_that_cannot_say_a_model_any_more_gives_way_to_one_that_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    source = folder_of("llama", 0, tmp_path / "hf")
    import_folder(source, tmp_path / "run", None)
    checkpoint = open_checkpoint(tmp_path / "run")
    model = dataclasses.replace(checkpoint.model, pattern="*-" * 3 + "-", layers=[])
    model.mlp.intermediate_size = 256
    (tmp_path / "child").mkdir()
    (tmp_path / "run" / "hf").rename(tmp_path / "child" / "hf")
    run_of(model, tmp_path / "child")
    with caplog.at_level(logging.WARNING):
        export_checkpoint(tmp_path / "child", tmp_path / "out", None, HUGE)
    assert (
        "began as llama, which cannot say it any more; it is exported as nemotron-nas"
        in caplog.text
    )
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [one["attention"]["no_op"] for one in said["block_configs"]] == [False] * 3 + [True]


def test_longrope_keeps_the_length_that_its_cosines_are_scaled_by(tmp_path: Path) -> None:
    """A run of 64 tokens a row; the class divides max_position_embeddings by the original one."""
    model = tiny("*-*-", "llama")
    model.attention.rope = Rope(
        theta=1e4, scaling=RopeScaling.longrope, original_length=16, maximum_length=48,
        short_factors=[1.0] * 4, long_factors=[2.0] * 4,
    )  # fmt: skip
    export_checkpoint(run_of(model, tmp_path / "run"), tmp_path / "out", None, HUGE)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["max_position_embeddings"] == 48
    import_folder(tmp_path / "out", tmp_path / "again", None)
    assert open_checkpoint(tmp_path / "again").model.attention.rope == model.attention.rope
    export_checkpoint(tmp_path / "again", tmp_path / "out2", None, HUGE)
    said = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert said["max_position_embeddings"] == 48


FAMILIES = {
    "nemotron_h": ("M*E-", "hybrid", {}),
    "llama": ("*-*-", "llama", {}),
    "qwen3": ("*-*-", "qwen", {"qkv_bias": False}),
    "qwen2": ("*-*-", "qwen", {"qk_norm": False}),
    "nemotron": ("*-*-", "nemotron", {}),
    "phi3": ("*-*-", "llama", {"rope": Rope(theta=10.0, fraction=0.5)}),
    "nemotron-nas": ("*--*-", "llama", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_becomes_the_first_family_that_can_say_it(
    groups: Any, family: str, tmp_path: Path
) -> None:
    pattern, like, changes = FAMILIES[family]
    model = tiny(pattern, like)
    for name, value in changes.items():
        setattr(model.attention, name, value)
    model.mlp.intermediate_size = 256
    run = run_of(model, tmp_path / "run")
    export_checkpoint(run, tmp_path / "out", None, HUGE)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == family
    assert said["head_dim"] == model.attention.head_dim
    import_folder(tmp_path / "out", tmp_path / "again", None)
    again = open_checkpoint(tmp_path / "again").model
    assert (again.attention, again.mlp, again.norm, again.tie_embeddings, again.pattern) == (
        model.attention, model.mlp, model.norm, model.tie_embeddings, model.pattern,
    )  # fmt: skip
    if family in ("nemotron_h", "nemotron-nas"):
        return
    tokens = tokens_of(40)
    expected = our_logits(groups, run, tokens)
    kind = getattr(transformers, said["architectures"][0])
    theirs = kind.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(tokens, use_cache=False).logits
    assert (found - expected).abs().max() < SHARE * expected.std()


def test_a_model_that_no_family_can_say_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    model = tiny("*-*-", "llama")
    model.mlp.gated, model.mlp.activation = False, Activation.squared_relu
    with pytest.raises(UserError) as error:
        export_checkpoint(run_of(model, tmp_path / "run"), tmp_path / "out", None, HUGE)
    said = str(error.value)
    assert "no family of Hugging Face can say this model" in said
    assert "llama: model.mlp.activation is squared_relu, gated false, not silu, gated true" in said
    assert "nemotron: model.norm is rms, not layer_1p" in said
    assert "nemotron_h: model.attention.rope.theta is 100: it has no positions" in said
