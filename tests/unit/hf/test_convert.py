"""Import and export: to the bit, in every layout, under other layouts' names and formats."""

import json
import logging
from pathlib import Path

import pytest
import torch

from hybrid_train.checkpoint.tensor_files import StoredTensors
from hybrid_train.hf.read import INDEX, Folder, import_folder
from hybrid_train.hf.write import Weights, export_checkpoint, open_checkpoint
from hybrid_train.jobs.convert import differences
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import UserError
from tests.hf_folders import SHAPES, VOCAB, folder_of, read_files, write_files

SUPER = "Super, latent experts, MTP"
BIAS = "backbone.layers.1.mixer.gate.e_score_correction_bias"
HUGE = 2**40  # bytes of a file: one file for all


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("stacked", "shards"), [(False, 1), (True, 3)], ids=["released", "native"])
def test_a_round_trip_keeps_every_bit_and_every_field(
    shape: str, stacked: bool, shards: int, tmp_path: Path
) -> None:
    source = folder_of(shape, tmp_path / "hf", stacked=stacked, shards=shards)
    import_folder(source, tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "again", None, 10_000)
    with Folder(source) as before, Folder(tmp_path / "again") as after:
        assert before.names == after.names
        for name in before.names:
            assert before.dtype(name) == after.dtype(name)
            rows = before.shape(name)[0]
            assert torch.equal(before.read(name, 0, rows), after.read(name, 0, rows)), name
    for file in ("config.json", "generation_config.json"):
        kept = json.loads((tmp_path / "again" / file).read_text())
        assert kept == json.loads((source / file).read_text())


def test_an_export_is_in_shards_with_an_index_that_the_library_reads(tmp_path: Path) -> None:
    import_folder(folder_of(SUPER, tmp_path / "hf"), tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, 40_000)
    tensors = read_files(tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert all((tmp_path / "out" / file).stat().st_size < 50_000 for file in files)


def test_padded_rows_of_the_vocabulary_are_cut_from_embedding_and_head(tmp_path: Path) -> None:
    import_folder(folder_of("dense H", tmp_path / "hf"), tmp_path / "run", None)
    checkpoint = open_checkpoint(tmp_path / "run")
    with StoredTensors(checkpoint.found.path) as stored:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert stored.shape(key) == (128, 32)
            assert not stored.read(key, VOCAB, 128).any()
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    tensors = read_files(tmp_path / "out")
    assert tensors["backbone.embeddings.weight"].shape == (VOCAB, 32)
    assert tensors["lm_head.weight"].shape == (VOCAB, 32)


def test_a_cast_is_done_and_its_loss_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job that ran in this process before keeps its messages from pytest.
    monkeypatch.setattr(logging.getLogger("hybrid_train"), "propagate", True)
    source = folder_of(SUPER, tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        import_folder(source, tmp_path / "run", torch.bfloat16)
    assert "the cast to bfloat16 is lossy" in caplog.text
    assert open_checkpoint(tmp_path / "run").job.precision.format is GemmFormat.bf16
    caplog.clear()
    export_checkpoint(tmp_path / "run", tmp_path / "out", torch.float32, HUGE)
    assert "lossy" not in caplog.text
    before, after = read_files(source), read_files(tmp_path / "out")
    for name, tensor in before.items():
        expected = tensor if name.endswith("correction_bias") else tensor.bfloat16().float()
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], expected), name
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == "float32"


def test_expert_biases_stay_float32(tmp_path: Path) -> None:
    import_folder(folder_of(SUPER, tmp_path / "hf"), tmp_path / "run", torch.bfloat16)
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    after = read_files(tmp_path / "out")
    assert after[BIAS].dtype == torch.float32
    assert after["backbone.layers.1.mixer.gate.weight"].dtype == torch.bfloat16


def test_a_tied_head_is_left_out_and_written_again(tmp_path: Path) -> None:
    source = folder_of("dense H", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from"):
        import_folder(source, tmp_path / "run", None)
    tensors = read_files(source)
    del tensors["lm_head.weight"]
    write_files(source, tensors)
    import_folder(source, tmp_path / "run", None)
    export_checkpoint(tmp_path / "run", tmp_path / "out", None, HUGE)
    after = read_files(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], tensors["backbone.embeddings.weight"])


def test_a_comparison_finds_each_kind_of_difference(tmp_path: Path) -> None:
    source = folder_of(SUPER, tmp_path / "hf")
    import_folder(source, tmp_path / "run", None)
    tensors = read_files(source)
    tensors["backbone.layers.0.mixer.in_proj.weight"][70, 3] += 1
    tensors["backbone.layers.0.mixer.D"] = tensors["backbone.layers.0.mixer.D"].double().half()
    tensors["backbone.layers.9.norm.weight"] = torch.ones(32)
    tensors["backbone.norm_f.weight"] = torch.ones(16)
    del tensors["mtp.layers.0.enorm.weight"]
    write_files(source, tensors)
    checkpoint = open_checkpoint(tmp_path / "run")
    with StoredTensors(checkpoint.found.path) as stored, Folder(source) as folder:
        found = differences(checkpoint, Weights(stored, best=False), folder)
    assert not found.is_same_model
    assert found.only_ours == ["mtp.layers.0.enorm.weight"]
    assert found.only_theirs == ["backbone.layers.9.norm.weight"]
    assert found.shapes == ["backbone.norm_f.weight: (32,) here, (16,) there"]
    assert found.formats == ["backbone.layers.0.mixer.D: float32 here, float16 there"]
    (value,) = found.values
    assert value == "backbone.layers.0.mixer.in_proj.weight: by at most 1, first at [70, 3]"


def test_an_output_that_is_there_already_is_not_touched(tmp_path: Path) -> None:
    source = folder_of("dense H", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        import_folder(source, tmp_path / "run", None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
