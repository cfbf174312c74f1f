"""Logits of an imported and of an exported model against transformers, for every shape."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_train.hf import config_json
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.verify import load_theirs
from hybrid_train.hf.write import export_checkpoint, open_checkpoint
from hybrid_train.schema.model import Model, Moe
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.runtime import Device, Kernels, Runtime
from tests.hf_folders import SHAPES, VOCAB, folder_of, model_of, tokens_of
from tests.sampled import sampled
from tests.tiny import MEGATRON_WARNINGS

pytestmark = MEGATRON_WARNINGS
LENGTHS = (1, 127, 128, 129, 300)  # around the chunk of the scan, and beyond
RUNTIME = Runtime(device=Device.cpu, kernels=Kernels.plain, threads=1)
SUPER = "Super, latent experts, MTP"
SHARE = 1e-4  # of the standard deviation of the logits


@pytest.mark.parametrize("shape", sampled(SHAPES, SUPER))
def test_imported_and_exported_models_have_the_logits_of_transformers(
    groups: Any, shape: str, tmp_path: Path
) -> None:
    from hybrid_train.checkpoint.save_load import read_weights
    from hybrid_train.model.build import build_model

    theirs = model_of(shape)
    import_folder(folder_of(shape, tmp_path / "theirs", shards=2), tmp_path / "run", None)
    checkpoint = open_checkpoint(tmp_path / "run")
    checkpoint.job.runtime = RUNTIME
    ours = build_model(checkpoint.job, groups, VOCAB, on_gpu=False).chunks[0].eval()
    read_weights(checkpoint.found.path, [ours], groups)
    export_checkpoint(tmp_path / "run", tmp_path / "again", None, 2**40)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    for length in LENGTHS:
        tokens = tokens_of(length)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
            exported = again(tokens, use_cache=False).logits
            imported = ours(tokens).logits()[..., :VOCAB]
        for name, found in (("imported", imported), ("exported", exported)):
            largest = (found - expected).abs().max()
            assert largest <= SHARE * expected.std(), f"{name}, length {length}"


def test_transformers_is_compared_with_the_former_spellings_of_a_config_too(tmp_path: Path) -> None:
    folder = folder_of("dense H", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    del config["layer_norm_epsilon"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_theirs(folder, config_json.to_model(config, folder))
    assert loaded.model.norm_f.variance_epsilon == 0.5


def test_a_single_expert_is_said_to_be_beyond_transformers(tmp_path: Path) -> None:
    model = Model(pattern="ME", hidden_size=8, moe=Moe(experts=1, top_k=1))
    with pytest.raises(UserError, match=r"cannot run a single expert .* logits=false"):
        load_theirs(tmp_path, model)
