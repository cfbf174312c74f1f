"""Whose checkpoint a folder is, by what is in it, and what is wrong with it."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybrid_train.checkpoint.tensor_files import CheckpointWriter
from hybrid_train.nvidia.checkpoint_folders import Trainer, look, trainer_of
from hybrid_train.schema.problems import UserError
from tests.core_save import ARGUMENTS, BRIDGE_MODEL, NEMO_MODEL

ROWS = torch.zeros(4, 2)


def weights_in(folder: Path, common: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one tensor, and of what is beside it."""
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder)
    writer.place("a", (4, 2), 0, (4, 2), ROWS.dtype).write(ROWS)
    writer.finish(common)
    return folder


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def megatron_lm(root: Path, iteration: int = 500) -> Path:
    import argparse

    common = {"args": argparse.Namespace(**ARGUMENTS), "iteration": iteration}
    weights_in(root / f"iter_{iteration:07d}", common)
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return root


def test_a_folder_of_megatron_lm_is_known_by_its_iterations(tmp_path: Path) -> None:
    megatron_lm(tmp_path, 400)
    megatron_lm(tmp_path, 500)
    weights_in(tmp_path / "iter_0000600")  # newer, and not the one that the tracker names
    found = look(tmp_path)
    assert (found.trainer, found.step, found.samples) == (Trainer.megatron_lm, 500, 12)
    assert found.weights == tmp_path / "iter_0000500"
    assert look(tmp_path / "iter_0000400").step == 400


def test_without_a_tracker_the_newest_iteration_counts(tmp_path: Path) -> None:
    for iteration in (900, 1000):
        megatron_lm(tmp_path, iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert look(tmp_path).step == 1000


def test_a_release_is_read(tmp_path: Path) -> None:
    megatron_lm(tmp_path, 500)
    (tmp_path / "iter_0000500").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert look(tmp_path).weights == tmp_path / "release"


def test_common_pt_of_older_versions_is_read(tmp_path: Path) -> None:
    import argparse

    folder = weights_in(tmp_path / "iter_0000007")
    common = {"args": argparse.Namespace(**ARGUMENTS), "iteration": 7}
    (folder / "common.pt").write_bytes(saved(common))
    assert (look(folder).step, look(folder).settings["hidden_size"]) == (7, 32)


def test_a_folder_of_megatron_bridge_is_known_by_its_config(tmp_path: Path) -> None:
    folder = weights_in(tmp_path / "iter_0000500", {"iteration": 500})
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": BRIDGE_MODEL}))
    state = {"step": torch.tensor(500), "consumed_train_samples": torch.tensor(2000)}
    (folder / "train_state.pt").write_bytes(saved(state))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    for place in (tmp_path, folder):
        found = look(place)
        assert (found.trainer, found.step, found.samples) == (Trainer.bridge, 500, 2000)
        assert found.tokenizer == folder / "tokenizer"


def test_fields_inside_of_a_builders_config_count(tmp_path: Path) -> None:
    folder = weights_in(tmp_path / "iter_0000500")
    outer = {"vocab_size": 61, "hybrid_layer_pattern": "M"}
    model = {"_builder_": "x", **outer, "transformer": {"hidden_size": 64}}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    settings = look(tmp_path).settings
    assert (settings["hidden_size"], settings["vocab_size"]) == (64, 61)


def test_a_folder_of_nemo_is_known_by_its_two_folders(tmp_path: Path) -> None:
    data = {"PreTrainingDataModule": {"consumed_samples": 80}}
    weights_in(tmp_path / "weights", {"global_step": 20, **data})
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump(NEMO_MODEL))
    found = look(tmp_path)
    assert (found.trainer, found.step, found.samples) == (Trainer.nemo, 20, 80)
    assert found.prefix == "module."


def test_other_folders_are_of_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    assert trainer_of(tmp_path) is None
    assert trainer_of(tmp_path / "missing") is None


def test_code_in_yaml_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = weights_in(tmp_path / "iter_0000500")
    evil = f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']"
    (folder / "run_config.yaml").write_text(evil)
    with pytest.raises(UserError, match="is no YAML of plain data"):
        look(tmp_path)
    assert not (tmp_path / "made").exists()


def test_code_in_common_pt_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    folder = weights_in(tmp_path / "iter_0000500")
    (folder / "common.pt").write_bytes(saved({"args": Evil()}))
    with pytest.raises(UserError, match=r"common.pt asks for posix\.mkdir"):
        look(tmp_path)
    assert not (tmp_path / "made").exists()


def damaged(tmp_path: Path, how: str) -> None:
    folder = megatron_lm(tmp_path) / "iter_0000500"
    if how == "tracker":
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    elif how == "missing":
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("501")
    elif how == "old format":
        (folder / ".metadata").unlink()
        (folder / "mp_rank_00").mkdir()
    elif how == "other format":
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    elif how == "no arguments":
        (folder / "common.pt").write_bytes(saved({"iteration": 5}))
    elif how == "no count":
        (folder / "common.pt").write_bytes(saved({"args": torch.Size((1,)), "iteration": "5"}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("tracker", "says '../../etc', which is no iteration"),
        ("missing", "iter_0000501 is missing"),
        ("old format", "--ckpt-convert-format torch_dist"),
        ("other format", "the format 'zarr' is not read, only torch_dist"),
        ("no arguments", "holds no args"),
        ("no count", "holds no args"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, how: str, said: str) -> None:
    damaged(tmp_path, how)
    with pytest.raises(UserError) as error:
        look(tmp_path)
    assert said in str(error.value)
