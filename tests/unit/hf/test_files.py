"""What the system refuses, and JSON that every reader takes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_train.hf.files import as_strict_json, refusals_named, write_json
from hybrid_train.hf.read import import_folder
from hybrid_train.jobs import cli
from hybrid_train.schema.problems import UserError
from tests.hf_folders import folder_of
from tests.jobs.command import contents
from tests.unprivileged import modes_count

Run = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line where permissions count; returns the message of the refusal."""

    def call(*words: str) -> str:
        capsys.readouterr()
        with modes_count():
            code = cli.main(list(words))
        said = capsys.readouterr().err
        assert code == 2, said
        assert "Traceback" not in said
        return said

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of("dense H", tmp_path_factory.mktemp("source") / "hf")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_of_an_import_that_may_not_be_read_is_named_and_nothing_is_left(
    source: Path, name: str, tmp_path: Path, refused: Run
) -> None:
    (source / name).chmod(0)
    try:
        said = refused("convert", f"import={source}", f"output={tmp_path / 'run'}")
    finally:
        (source / name).chmod(0o644)
    assert str(source / name) in said
    assert "Permission denied" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["closed", "no entry"])
def test_a_folder_that_may_not_be_entered_is_named_with_its_setting(
    source: Path, mode: int, tmp_path: Path, refused: Run
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=mode)
    message = f"= {closed / 'in'}: cannot be read: Permission denied"
    assert f"import {message}" in refused("convert", f"import={closed / 'in'}", "output=x")
    assert f"export {message}" in refused("convert", f"export={closed / 'in'}", "output=x")
    assert f"hf {message}" in refused("verify", f"checkpoint={source}", f"hf={closed / 'in'}")
    assert f"checkpoint {message}" in refused("generate", f"checkpoint={closed / 'in'}", "prompt=a")
    load = ("checkpoint.load_only=weights", f"checkpoint.load={closed / 'in'}")
    assert f"checkpoint.load {message}" in refused("train", "experiment=tiny_cpu", *load)


@pytest.mark.parametrize("name", ["run", "deep/er/run"])
def test_an_output_where_nothing_may_be_written_is_named_with_its_setting(
    source: Path, name: str, tmp_path: Path, refused: Run
) -> None:
    import_folder(source, tmp_path / "run", None)
    before = contents(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for what in (f"import={source}", f"export={tmp_path / 'run'}"):
        said = refused("convert", what, f"output={closed / name}")
        assert f"output = {closed / name}: Permission denied" in said
        assert ".partial" not in said
    assert contents(tmp_path) == before
    assert not list(closed.iterdir())


def test_an_output_that_is_a_file_or_lies_below_one_is_refused(
    source: Path, tmp_path: Path, refused: Run
) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused("convert", f"import={source}", f"output={tmp_path / 'file'}")
    assert f"output = {tmp_path / 'file'}: is there already" in said
    said = refused("convert", f"import={source}", f"output={tmp_path / 'file' / 'run'}")
    assert f"output = {tmp_path / 'file' / 'run'}: Not a directory" in said
    assert contents(tmp_path) == {"file": b"mine"}


def test_weights_of_a_checkpoint_that_may_not_be_read_are_named(
    source: Path, tmp_path: Path, refused: Run
) -> None:
    import_folder(source, tmp_path / "run", None)
    (file,) = (tmp_path / "run").rglob("*.distcp")
    file.chmod(0)
    said = refused("verify", f"checkpoint={tmp_path / 'run'}", f"hf={source}")
    assert f"{file} cannot be read: Permission denied" in said


def test_a_refusal_of_a_file_elsewhere_names_all_settings() -> None:
    with (
        pytest.raises(UserError, match=r"nowhere \(import=a, output=b\)$"),
        refusals_named(**{"import": Path("a"), "output": Path("b")}),
    ):
        open("/nowhere")  # noqa: SIM115  it does not open


def test_numbers_that_are_none_in_json_are_written_as_transformers_does(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [math.inf, {"b": -math.inf}], "c": math.nan, "d": 1.5})
    tag = "__float__"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [{tag: "Infinity"}, {"b": {tag: "-Infinity"}}],
        "c": {tag: "NaN"},
        "d": 1.5,
    }


@pytest.mark.parametrize("text", ['{"a": "NaN", "Infinity": 1}', "{\n\n}"])
def test_a_file_that_is_strict_json_keeps_every_byte(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    as_strict_json(path)
    assert path.read_text() == text
