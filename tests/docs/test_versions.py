"""docs/versions.md says what the tables in the code say, and the changelog has a place for news."""

import re
from collections.abc import Iterator
from pathlib import Path

import hybrid_train
from hybrid_train.config.supported import LIBRARIES
from hybrid_train.schema.formats import FORMATS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "versions.md"


def format_rows() -> Iterator[str]:
    """Write the rows of the first table; `python -m tests.docs.test_versions` prints both."""
    for one in FORMATS:
        for number, what in enumerate(one.changes, start=1):
            read = "yes" if number >= one.oldest_read else f"no: {one.too_old}"
            yield f"| {one.name} | {number} | {what} | {read} |"


def library_rows() -> Iterator[str]:
    for name, one in LIBRARIES.items():
        other = "no run starts" if one.others_refused else "a warning"
        cells = (name, one.tested, one.minimum, one.maximum, one.proof, other)
        yield f"| {' | '.join(cells)} |"


def rows(section: str) -> list[str]:
    """Return the rows of the table in a section, without its head."""
    (text,) = (part for part in PAGE.read_text().split("\n## ") if part.startswith(section))
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def test_the_table_of_formats_is_that_of_the_code() -> None:
    assert rows("Files") == list(format_rows())


def test_the_table_of_libraries_is_that_of_the_code() -> None:
    assert rows("Libraries") == list(library_rows())


def test_the_changelog_begins_with_what_is_not_released_and_has_each_version_once() -> None:
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased"
    assert len(heads) == len(set(heads))
    released = hybrid_train.__version__
    assert released.endswith(".dev0") or heads[1] == released


if __name__ == "__main__":
    print("\n".join([*format_rows(), "", *library_rows()]))
