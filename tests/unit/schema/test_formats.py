"""Which versions of formats are read, and what is said of the others."""

import json
from pathlib import Path

import pytest

from hybrid_train import __version__
from hybrid_train.schema.formats import (
    FILE_NAME,
    FORMATS,
    Format,
    require_readable_folder,
    write_stamp,
)
from hybrid_train.schema.problems import UserError

SHELF = Format("shelf", ("of wood", "of steel", "of glass"), "buy another", oldest_read=2)


def test_a_folder_says_its_format_and_who_wrote_it(tmp_path: Path) -> None:
    write_stamp(tmp_path, SHELF)
    said = json.loads((tmp_path / FILE_NAME).read_text())
    assert said == {"name": "shelf", "version": 3, "written_by": __version__}
    assert require_readable_folder(tmp_path, SHELF) == 3


def test_older_versions_are_read_down_to_the_oldest() -> None:
    assert SHELF.require_readable(SHELF.stamp() | {"version": 2}, "x") == 2
    with pytest.raises(UserError, match=r"x was written by.*format 1.*reads format 2 to 3: buy an"):
        SHELF.require_readable(SHELF.stamp() | {"version": 1}, "x")


def test_what_says_no_version_is_of_the_first(tmp_path: Path) -> None:
    plain = Format("shelf", ("of wood", "of steel"), "buy another")
    assert require_readable_folder(tmp_path, plain) == 1
    with pytest.raises(UserError, match=r"a version before there were numbers.*buy another"):
        require_readable_folder(tmp_path, SHELF)


def test_a_newer_version_is_refused_with_both_versions_and_the_way_out() -> None:
    with pytest.raises(UserError) as error:
        SHELF.require_readable({"name": "shelf", "version": 4, "written_by": "7.0.1"}, "x/y")
    assert str(error.value) == (
        f"x/y was written by hybrid_train 7.0.1 (shelf, format 4); this is hybrid_train "
        f"{__version__}, which reads up to format 3: upgrade hybrid_train to use it"
    )


@pytest.mark.parametrize(
    "stamp", [3, "3", [], {}, {"name": "shelf"}, {"name": "shelf", "version": True},
              {"name": "shelf", "version": 0}, {"name": 3, "version": 3}],
    ids=repr,
)  # fmt: skip
def test_a_damaged_stamp_is_named(stamp: object) -> None:
    with pytest.raises(UserError, match=r"x is damaged: .* says no version of a shelf"):
        SHELF.require_readable(stamp, "x")


def test_a_stamp_of_something_else_is_named() -> None:
    with pytest.raises(UserError, match="x belongs to a chair; a shelf is wanted there"):
        SHELF.require_readable({"name": "chair", "version": 1}, "x")


@pytest.mark.parametrize("text", ["", "{", "\udcff" * 2])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"{FILE_NAME} is damaged: "):
        require_readable_folder(tmp_path, SHELF)


def test_every_format_has_a_name_of_its_own_and_reads_what_it_writes() -> None:
    assert len({one.name for one in FORMATS}) == len(FORMATS)
    assert all(one.require_readable(one.stamp(), "x") == one.version for one in FORMATS)
