"""Prefixes of token files are named as input files are: each once, commas in quotes."""

from pathlib import Path

import pytest

from hybrid_train.data.prepare.inputs import find_prefixes
from hybrid_train.schema.problems import UserError
from tests.unit.data.corpus import write_corpus


def test_links_to_token_files_count_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "blobs" / "a", [5])
    write_corpus(tmp_path / "in" / "b", [5])
    for name, target in (("a", "blobs/a"), ("copy_of_a", "blobs/a"), ("a_b", "in/b")):
        for suffix in (".bin", ".idx"):
            (tmp_path / "in" / (name + suffix)).symlink_to(tmp_path / (target + suffix))
    expected = [str(tmp_path / "in" / name) for name in "ab"]
    for asked in ("in", "in/*", "in/*.idx", "in/**"):
        assert find_prefixes([str(tmp_path / asked)]) == expected


def test_token_files_that_two_inputs_name_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [5])
    with pytest.raises(UserError, match="names token files that are named before"):
        find_prefixes([str(tmp_path / "a"), str(tmp_path / "a.bin")])


def test_a_prefix_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_corpus(tmp_path / "lr=1,seed=2", [5])
    with pytest.raises(UserError) as refused:
        find_prefixes([f"{tmp_path}/lr=1,seed=3"])
    assert f"there is no {tmp_path}/lr=1,seed=3.idx; did you mean {tmp_path}/lr=1,seed=2? A" in str(
        refused.value
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no .*empty/\*\.idx"):
        find_prefixes([f"{tmp_path}/empty"])
