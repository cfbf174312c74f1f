"""The table of versions that were tried, and what else names a version."""

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hybrid_train.config.supported import LIBRARIES, Supported, pinned, plain_name
from tests.docker.programs import setup_words

ONE = Supported("2.3.1.post1", "2.1", "2.3.2", "everything")


@pytest.mark.parametrize("found", ["2.3.1.post1", "2.3.1.post1+cu13", "2.1", "2.1.0", "2.3.2"])
def test_a_version_between_the_limits_has_no_fault(found: str) -> None:
    assert ONE.fault(found) == ""


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ("2.0.9", "older than 2.1, the oldest that fits; tested: 2.3.1.post1"),
        ("2.1a0+nv26", "older than 2.1"),
        ("2.3.3", "newer than 2.3.2, the newest that was tried; tested: 2.3.1.post1"),
        ("main", "no version that can be compared"),
    ],
)
def test_another_version_says_which_limit_it_is_beyond(found: str, fault: str) -> None:
    assert fault in ONE.fault(found)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_tested_version_is_the_pinned_one_and_lies_between_the_limits(name: str) -> None:
    one = LIBRARIES[name]
    assert pinned()[name] == one.tested
    assert Version(one.minimum) <= Version(one.tested) <= Version(one.maximum)


def test_setup_lets_in_what_the_table_does() -> None:
    words = setup_words()
    lines = words["install_requires"] + [
        line for extra in ("gpu", "hf", "dev") for line in words["extras_require"][extra]
    ]
    asked = [Requirement(line) for line in lines]
    known = [one for one in asked if plain_name(one.name) in LIBRARIES]
    assert {plain_name(one.name) for one in known} == set(LIBRARIES)
    for one in known:
        table = LIBRARIES[plain_name(one.name)]
        assert one.specifier.contains(table.minimum)
        assert one.specifier.contains(table.maximum)
        if table.others_refused:
            assert str(one.specifier) == f"=={table.tested}"
