"""The lists of files in docs/adding.md are those of the patches that add such things."""

import re
from pathlib import Path

import pytest

from tests.patches.test_patches import MOST_FILES, touched

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_list_names_the_files_of_its_patch(name: str) -> None:
    (section,) = (one for one in PAGE.read_text().split("\n## ") if f"{name}.patch" in one)
    listed = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(touched(name))
