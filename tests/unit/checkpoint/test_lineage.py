"""What a folder says of its parents, and of theirs where these are gone."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.lineage import (
    FILE_NAME,
    TEACHER,
    WEIGHTS,
    Made,
    parent_of,
    read,
    renew,
    write,
)
from hybrid_train.schema.formats import KEY
from hybrid_train.schema.problems import UserError


def run_folder(folder: Path, step: int = 3) -> layout.Found:
    """A run folder with a config and one checkpoint, as far as a lineage looks."""
    place = layout.path_of(folder, step)
    place.mkdir(parents=True)
    layout.write_position(place, {"step": step, "tokens": 0})
    (place / "weights").write_text(folder.name)
    layout.write_checksums(place, {})
    (folder / "config.yaml").write_text(f"run_dir: {folder.name}\n")
    return layout.Found(place, step)


def made(job: str) -> Made:
    return Made(job, f"hybrid-train {job}", {"version": "0.1"}, {"torch": "2.11.0"})


def test_a_child_knows_its_ancestors_where_their_folders_are_gone(tmp_path: Path) -> None:
    parent = run_folder(tmp_path / "parent")
    write(tmp_path / "parent", made("train"), [])
    child = run_folder(tmp_path / "child", step=0)
    write(tmp_path / "child", made("prune"), [parent_of(WEIGHTS, "runs/parent", parent)])
    run_folder(tmp_path / "healed")
    parents = [parent_of(WEIGHTS, "x", child), parent_of(TEACHER, "runs/parent", parent)]
    checksums = [layout.digest_of(one.path) for one in (child, parent)]
    shutil.rmtree(tmp_path / "parent")
    write(tmp_path / "healed", made("train"), parents)
    found = read(tmp_path / "healed")
    assert found is not None
    assert [one.role for one in found.record.parents] == ["weights", "teacher"]
    assert [one.checksum for one in found.record.parents] == checksums
    assert {key: one.made.job for key, one in found.ancestors.items()} == {
        checksums[0]: "prune",
        checksums[1]: "train",
    }
    (of_child,) = found.ancestors[checksums[0]].parents
    assert of_child.checksum == checksums[1]


def test_a_run_that_goes_on_says_its_new_config_and_keeps_what_it_began_with(
    tmp_path: Path,
) -> None:
    parent = run_folder(tmp_path / "parent")
    run_folder(tmp_path / "run")
    write(tmp_path / "run", made("train"), [parent_of(WEIGHTS, "runs/parent", parent)])
    before = read(tmp_path / "run")
    text = "run_dir: longer\n"
    (tmp_path / "run" / "config.yaml").write_text(text)
    renew(tmp_path / "run")
    after = read(tmp_path / "run")
    assert before is not None
    assert after is not None
    assert after.record.config == hashlib.sha256(text.encode()).hexdigest() != before.record.config
    assert after.record.parents == before.record.parents


def test_a_run_from_before_has_none_and_gets_none_when_it_goes_on(tmp_path: Path) -> None:
    run_folder(tmp_path / "old")
    renew(tmp_path / "old")
    assert read(tmp_path / "old") is None
    assert read(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"ancestors": {}}'])
def test_a_damaged_lineage_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path)


def test_a_parent_with_a_damaged_lineage_is_named_without_its_ancestors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = run_folder(tmp_path / "parent")
    (tmp_path / "parent" / FILE_NAME).write_text("{")
    run_folder(tmp_path / "child")
    write(tmp_path / "child", made("prune"), [parent_of(WEIGHTS, "runs/parent", parent)])
    found = read(tmp_path / "child")
    assert found is not None
    assert [one.step for one in found.record.parents] == [3]
    assert not found.ancestors
    assert "is damaged" in caplog.text


def test_a_lineage_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    write(tmp_path / "run", made("train"), [])
    path = tmp_path / "run" / FILE_NAME
    said = json.loads(path.read_text())
    said[KEY]["version"] += 1
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match="upgrade hybrid_train"):
        read(tmp_path / "run")
