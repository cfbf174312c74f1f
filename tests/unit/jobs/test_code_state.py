"""Which code runs: of a checkout, of a copy of one, of an installed package."""

import subprocess
from pathlib import Path

from hybrid_train.jobs.code_snapshot import SNAPSHOT, code_of, version_text


def test_a_checkout_says_its_commit_and_whether_its_files_differ(checkout: Path) -> None:
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True)
    assert code_of(checkout) == {"commit": commit.strip(), "dirty": False}
    (checkout / "notes.txt").write_text("of no part of the package")
    assert not code_of(checkout)["dirty"]
    (checkout / "hybrid_train" / "new.py").touch()
    assert code_of(checkout)["dirty"]


def test_a_copy_of_the_code_says_the_commit_that_it_was_made_of(
    checkout: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    said = version_text(checkout, is_checkout=True)
    (copy / SNAPSHOT).write_text(said)
    assert code_of(copy) == code_of(checkout)
    (checkout / "hybrid_train" / "a.py").write_text("2\n")
    (copy / SNAPSHOT).write_text(version_text(checkout, is_checkout=True))
    assert code_of(copy) == {"commit": code_of(checkout)["commit"], "dirty": True}


def test_an_installed_package_in_a_repository_of_the_users_is_not_taken_for_it(
    checkout: Path,
) -> None:
    packages = checkout / "venv" / "site-packages"
    packages.mkdir(parents=True)
    assert code_of(packages) == {}
