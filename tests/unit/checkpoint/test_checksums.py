"""Checksums of a checkpoint find what a disk or a network did to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_train.checkpoint import layout


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        (tmp_path / f"__{number}_0.distcp").write_bytes(bytes(range(256)) * (number + 1))
    layout.write_checksums(tmp_path, {})
    return tmp_path


def test_what_is_as_it_was_written_has_no_damage(folder: Path) -> None:
    assert layout.damages(folder) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [(flip, "other bytes"), (cut, "has 767 bytes, not 768"), (Path.unlink, "is missing")],
)
def test_damage_is_named(folder: Path, harm: Callable[[Path], None], words: str) -> None:
    harm(folder / "__2_0.distcp")
    (found,) = layout.damages(folder)
    assert found.startswith("__2_0.distcp")
    assert words in found


def test_every_file_is_in_one_of_the_parts(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        flip(path)
    found = [one for part in range(3) for one in layout.damages(folder, part=part, parts=3)]
    assert len(found) == len(set(found)) == 5


def test_checksums_that_are_known_are_not_computed_again(folder: Path) -> None:
    layout.write_checksums(folder, {"__0_0.distcp": (256, 1)})
    assert layout.damages(folder) == ["__0_0.distcp has other bytes than were written"]


def test_damaged_checksums_are_damage_and_a_checkpoint_without_is_taken(folder: Path) -> None:
    cut(folder / layout.CHECKSUMS)
    cut(folder / layout.CHECKSUMS)
    assert "cannot be read" in layout.damages(folder)[0]
    (folder / layout.CHECKSUMS).unlink()
    assert layout.damages(folder) == []
