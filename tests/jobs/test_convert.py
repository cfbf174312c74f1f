"""The jobs convert and verify from their command lines, and what other jobs do with the result."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_train.jobs import cli
from tests.hf_folders import read_files, write_files
from tests.jobs.command import contents, finish, start, train
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = [*MEGATRON_WARNINGS, pytest.mark.xdist_group("convert")]
CPU = ("runtime=cpu", "runtime.threads=1")
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command line; returns the exit code and all that was said."""

    def command(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        shown = capsys.readouterr()
        with alone():  # fails if the job, however it ended, left its groups behind
            pass
        return code, shown.out + shown.err

    return command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder of the smallest model after two steps."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    done = train(folder, f"data.folder={corpus}", "train.tokens=512")
    assert done.code == 0, done.said
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.with_name("exported")
    done = finish(start("convert", f"export={run}", f"output={folder}", cold=True))
    assert done.code == 0, done.said
    return folder


def test_a_trained_checkpoint_is_exported_and_verified(
    run: Path, exported: Path, call: Call
) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "model.safetensors.index.json" in names
    code, said = call("verify", f"checkpoint={run}", f"hf={exported}", "length=40", *CPU)
    assert code == 0, said
    assert "beyond the tolerance: none" in said
    assert f"{exported} is the model of {run}" in said


def test_verify_finds_a_changed_weight_and_the_position_it_shows_at(
    run: Path, exported: Path, call: Call, tmp_path: Path
) -> None:
    tensors = read_files(exported)
    tensors["backbone.layers.2.mixer.v_proj.weight"][0] += 0.5
    for file in exported.glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write_files(tmp_path, tensors)
    code, said = call("verify", f"checkpoint={run}", f"hf={tmp_path}", "length=40", *CPU)
    assert code == 2
    assert "1 tensor of other values: backbone.layers.2.mixer.v_proj.weight: by at most" in said
    assert "the first at position 0" in said
    assert "the tensors differ and the logits differ" in said


@pytest.mark.slow
def test_an_imported_model_generates_and_trains_on(
    exported: Path, corpus: Path, call: Call, tmp_path: Path
) -> None:
    imported, trained = tmp_path / "imported", tmp_path / "trained"
    code, said = call("convert", f"import={exported}", f"output={imported}")
    assert code == 0, said
    prompt = ("prompt=import os", "max_new_tokens=3")
    code, said = call("generate", f"checkpoint={imported}", *prompt, *CPU)
    assert code == 0, said
    assert said.count("import os") == 2  # what starts, and the text
    start_from = (f"checkpoint.load={imported}", "checkpoint.load_only=weights")
    done = train(trained, f"data.folder={corpus}", "train.tokens=512", *start_from)
    assert done.code == 0, done.said
    assert "starting from the weights of" in done.said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("output=x",), "import, export = neither"),
        (("import=nowhere", "output=x"), "import = nowhere: there is no such folder"),
        (("export=nowhere", "output=x"), "export = nowhere: there is no such folder"),
        (("import=conf",), "output = ???: is not set"),
        (("import=conf", "output=x", "dtype=int8"), "must be one of keep, float32"),
        (("import=conf", "output=x"), "config.json cannot be read"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(
    words: tuple[str, ...], message: str, call: Call
) -> None:
    code, said = call("convert", *words)
    assert code == 2
    assert message in said
    assert not Path("x").exists()


def test_a_failed_conversion_leaves_everything_as_it_was(
    exported: Path, call: Call, tmp_path: Path
) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nemotron_h"
    before = contents(tmp_path)
    code, said = call("convert", f"import={tmp_path}", f"output={tmp_path / 'run'}")
    assert code == 2
    assert f"{shard}: " in said
    assert "is cut short" in said
    assert contents(tmp_path) == before


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("job", ["convert", "generate"])
def test_a_checkpoint_of_a_stranger_runs_no_code(
    run: Path, job: str, call: Call, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (index,) = (tmp_path / "run").rglob(".metadata")
    index.write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    words = {
        "convert": (f"export={tmp_path / 'run'}", f"output={tmp_path / 'out'}"),
        "generate": (f"checkpoint={tmp_path / 'run'}", "prompt=a", *CPU),
    }
    code, said = call(job, *words[job])
    assert code == 2
    assert "asks for posix.mkdir, which no index of tensors needs" in said
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
