"""An example of each version of run folders, checkpoints and data is read; a newer one is not."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from hybrid_train import __version__
from hybrid_train.checkpoint import layout
from hybrid_train.data.prepare.manifest import read_manifest
from hybrid_train.schema.formats import (
    FILE_NAME,
    KEY,
    RUN_FOLDER,
    STORED_TARGETS,
    TOKEN_FILES,
    Format,
)
from tests.formats.make import CORPUS, ROW, ROWS, RUN, STEPS, TARGETS, TRAINING
from tests.jobs.command import contents, finish, metrics, start, train
from tests.sampled import sampled

HERE = Path(__file__).parent
TWICE = f"train.tokens={2 * STEPS * ROW * ROWS}"


def examples(name: str) -> list[int]:
    """List the versions of which there is an example."""
    found = (re.fullmatch(rf"{name}_(\d+)\.tar\.xz", path.name) for path in HERE.iterdir())
    return sorted(int(one[1]) for one in found if one)


def unpacked(name: str, version: int, folder: Path) -> Path:
    with tarfile.open(HERE / f"{name}_{version}.tar.xz") as archive:
        archive.extractall(folder / name, filter="data")
    return folder / name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the examples, made now, with twice their steps."""
    run_dir = tmp_path_factory.mktemp("whole") / RUN
    done = finish(start(*TRAINING[:-1], TWICE, f"run_dir={run_dir}"))
    assert done.code == 0, done.said
    return run_dir


@pytest.mark.parametrize(
    ("name", "format"),
    [(RUN, RUN_FOLDER), (CORPUS, TOKEN_FILES), (TARGETS, STORED_TARGETS)],
)
def test_each_version_that_is_read_has_a_small_example(name: str, format: Format) -> None:
    assert examples(name) == list(range(format.oldest_read, format.version + 1))
    assert all(path.stat().st_size < 100_000 for path in HERE.glob("*.tar.xz"))


@pytest.mark.parametrize("version", sampled(examples(RUN), RUN_FOLDER.version))
def test_a_run_goes_on_in_the_folder_of_any_version(
    version: int, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = unpacked(RUN, version, tmp_path)
    done = finish(start("resume", f"run_dir={run_dir}", TWICE))
    assert done.code == 0, done.said
    # Not to the bit: the first steps were taken on another processor.
    losses = [[line["loss"] for line in metrics(run)] for run in (run_dir, whole_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((run_dir / FILE_NAME).read_text())["version"] == RUN_FOLDER.version
    said = finish(start("status", f"run_dir={run_dir}", "--json"))
    first, second = json.loads(said.out)["attempts"]
    assert (first["outcome"], second["outcome"]) == ("finished", "finished")
    assert bool(first["provenance"]) == (version > 1)
    assert second["provenance"]["command"].startswith("hybrid-train resume run_dir=")
    assert second["provenance"]["code"]["version"] == __version__
    (machine,) = second["provenance"]["machines"]
    assert machine["count"] == 1


@pytest.mark.parametrize("version", examples(CORPUS))
def test_a_corpus_of_any_version_is_checked_and_trained_on(version: int, tmp_path: Path) -> None:
    corpus = unpacked(CORPUS, version, tmp_path)
    assert read_manifest(corpus / "text") is not None
    assert finish(start("data", "verify", f"input={corpus / 'text'}")).code == 0
    files = [f"data.{part}=[{corpus / 'text'}]" for part in ("train", "validation")]
    files += ["data=files", f"data.tokenizer={corpus / 'tokenizer'}", "train.tokens=512"]
    done = train(tmp_path / "run", *files)
    assert done.code == 0, done.said


@pytest.mark.parametrize("version", examples(TARGETS))
def test_stored_targets_of_any_version_are_learned_from(version: int, tmp_path: Path) -> None:
    targets = unpacked(TARGETS, version, tmp_path)
    words = ("objective=distill", f"objective.targets={targets}", f"run_dir={tmp_path / 'run'}")
    done = finish(start(*TRAINING[:-1], *words))
    assert done.code == 0, done.said
    # The student begins as its teacher did, two steps of which are little.
    assert 0 < metrics(tmp_path / "run")[0]["loss"] < 0.1
    path = targets / FILE_NAME
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"version": said["version"] + 1, "written_by": "9.9.9"}))
    done = finish(start(*TRAINING[:-1], *words[:2], f"run_dir={tmp_path / 'other'}"))
    assert done.code == 2
    assert "was written by hybrid_train 9.9.9 (folder of stored targets, format 2)" in done.err
    assert not (tmp_path / "other").exists()


def make_newer(run_dir: Path, what: str) -> None:
    """Say in a run folder, or in its checkpoint, that it is of the version after the present."""
    path = run_dir / FILE_NAME
    said = json.loads(path.read_text())
    if what == "checkpoint":
        found = layout.latest(run_dir)
        assert found is not None
        path = found.path / layout.POSITION
        said = json.loads(path.read_text())
    stamp = said[KEY] if what == "checkpoint" else said
    stamp |= {"version": stamp["version"] + 1, "written_by": "9.9.9"}
    path.write_text(json.dumps(said))
    if what == "checkpoint":
        layout.write_checksums(path.parent, {})


@pytest.mark.parametrize("what", ["run folder", "checkpoint"])
@pytest.mark.parametrize(
    "words", [("resume", "run_dir={}", TWICE), ("generate", "checkpoint={}", "prompt=one")]
)
def test_what_a_newer_version_wrote_is_refused_before_anything_is_written(
    what: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = unpacked(RUN, RUN_FOLDER.version, tmp_path)
    make_newer(run_dir, what)
    before = contents(run_dir)
    done = finish(start(*(word.format(run_dir) for word in words)))
    assert done.code == 2
    assert f"was written by hybrid_train 9.9.9 ({what}, format 3)" in done.err
    assert "upgrade hybrid_train" in done.err
    assert contents(run_dir) == before
