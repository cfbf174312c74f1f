"""Folders from strangers: each fault is named with file and tensor, and leaves nothing behind."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_train.hf.read import INDEX, SINGLE, import_folder
from hybrid_train.schema.problems import UserError
from tests.hf_folders import folder_of, read_files, write_files

NORM = "backbone.norm_f.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("Nano 3, experts", tmp_path_factory.mktemp("hf") / "original")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, in one file."""
    target = tmp_path / "hf"
    target.mkdir()
    for file in original.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refusal(folder: Path) -> str:
    """Import a folder, which must fail and leave nothing behind; return what was said."""
    output = folder.parent / "run"
    with pytest.raises(UserError) as error:
        import_folder(folder, output, None)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return str(error.value)


def change_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of the single file, the values as they are."""
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def set_entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry(shape=[33]), "has 128 bytes, but F32 (33,) needs 132"),
        (set_entry(shape=[2**62, 2**62]), "needs"),
        (set_entry(shape=[-32]), "has shape [-32]"),
        (set_entry(shape=[0], data_offsets=[0, 0]), "which holds nothing"),
        (set_entry(data_offsets=[0, 128]), "instead of"),
        (set_entry(data_offsets=[10**9, 10**9 + 128]), "lies behind a gap"),
        (set_entry(dtype="U8"), "has the format U8"),
        (lambda header: header[NORM].pop("shape"), "has no dtype, shape or data_offsets"),
        (lambda header: header.update({NORM: 7}), "has no dtype, shape or data_offsets"),
    ],
)
def test_a_header_that_lies_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_header(folder, change)
    said = refusal(folder)
    assert message in said
    assert SINGLE in said


def test_a_header_longer_than_its_file_is_refused(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", 2**60) + content[8:])
    assert "its header says it is 1152921504606846976 bytes long" in refusal(folder)


def test_a_header_that_is_no_table_is_refused(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 4) + b"[[[[")
    assert f"{folder / SINGLE}: its header is damaged" in refusal(folder)


def test_a_truncated_shard_is_refused(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:-5])
    said = refusal(folder)
    assert f"{folder / SINGLE}: " in said
    assert "is cut short" in said


def test_a_tensor_twice_in_a_header_is_refused(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)[NORM])
    doubled = header[:-1] + f', "{NORM}": {entry}}}'.encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(doubled)) + doubled + content[8 + length :])
    assert f"{folder / SINGLE}: {NORM} stands in its header twice" in refusal(folder)


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    found = read_files(folder)
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    write_files(folder, found)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NORM: None}, f"{NORM} is missing"),
        ({"backbone.layers.1.mixer.experts.2.up_proj.weight": None}, "experts.2.up_proj"),
        ({NORM: torch.ones(31)}, f"{NORM} has shape (31,); the config asks for (32,)"),
        ({"backbone.layers.99.norm.weight": torch.ones(32)}, "has no place in the model"),
        ({"model.norm_f.weight": torch.ones(32)}, "a second time"),
        ({NORM: torch.tensor([1.0] * 7 + [torch.nan] + [1.0] * 24)}, f"{NORM} holds nan in row 7"),
        ({NORM: torch.full((32,), torch.inf)}, f"{NORM} holds inf in row 0"),
    ],
)
def test_wrong_tensors_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    changed(folder, **tensors)
    assert message in refusal(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "a\\b"])
def test_an_index_that_points_outside_is_refused(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    assert f"{NORM} lies in {file!r}, which is no file of this folder" in refusal(folder)


def test_an_index_is_held_against_its_files(folder: Path) -> None:
    names = dict.fromkeys(read_files(folder), SINGLE)
    for weight_map, message in (
        (names | {"more": SINGLE}, f"{folder / SINGLE}: more is missing"),
        ({name: file for name, file in names.items() if name != NORM}, f"{NORM} is not where"),
        (names | {NORM: "other.safetensors"}, f"{folder / 'other.safetensors'} is missing"),
        ([], "weight_map is no table"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert message in refusal(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, and pickles are not read" in refusal(folder)


def test_code_beside_a_model_is_neither_run_nor_copied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    import_folder(folder, folder.parent / "run", None)
    assert not list((folder.parent / "run").rglob("*.py"))
