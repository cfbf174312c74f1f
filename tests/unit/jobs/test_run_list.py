"""Which runs a command line names, and what is said of each."""

from pathlib import Path

import pytest

from hybrid_train.jobs.run_state import in_natural_order, runs_named
from hybrid_train.schema.problems import UserError
from tests.unit.jobs.synthetic_run import make

START = 1_700_000_000.0


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    for name in ("seed=2", "seed=10", "deep/er/run"):
        make(folder / name, steps=3, start=START)
    (folder / "notes").mkdir()
    (folder / "seed=2" / "inner").mkdir()
    (folder / "seed=2" / "inner" / "config.yaml").write_text("a: 1")  # a run's own files
    return folder


def test_one_run_folder_is_one_run(sweep: Path) -> None:
    found = runs_named([str(sweep / "seed=2")])
    assert found.alone
    assert list(found.folders.values()) == [sweep / "seed=2"]


def test_a_folder_of_runs_is_all_runs_below_it_in_the_order_of_their_numbers(sweep: Path) -> None:
    found = runs_named([str(sweep)])
    assert not found.alone
    assert list(found.folders) == ["deep/er/run", "seed=2", "seed=10"]
    assert found.place == sweep


def test_runs_may_be_listed_repeated_and_globbed(sweep: Path) -> None:
    both = [str(sweep / "seed=2"), str(sweep / "seed=10")]
    for texts in (both, [",".join(both)], [str(sweep / "seed=*")], [*both, both[0]]):
        found = runs_named(texts)
        assert list(found.folders) == ["seed=2", "seed=10"]
        assert found.place == sweep
        assert not found.alone


def test_a_folder_of_one_run_is_no_run_itself(sweep: Path) -> None:
    found = runs_named([str(sweep / "deep")])
    assert not found.alone
    assert list(found.folders) == ["er/run"]
    assert found.place == sweep / "deep"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere is no run folder: there is no such folder"),
        ("notes", "notes is not a run folder: it has no config.yaml, nor has a folder in it"),
        ("x*", "nothing matches it"),
    ],
)
def test_what_is_no_run_is_said(sweep: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        runs_named([str(sweep / "seed=2"), str(sweep / name)])


def test_a_run_that_cannot_be_read_is_left_out_unless_it_is_the_only_one(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        make(tmp_path / name, steps=3, start=START)
    (tmp_path / "bad" / "config.yaml").write_text("[")
    states, left_out = runs_named([str(tmp_path)]).look()
    assert list(states) == ["good"]
    assert "is damaged" in left_out["bad"]
    with pytest.raises(UserError, match="is damaged"):
        runs_named([str(tmp_path / "bad")]).look()


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["lr=1e-2", "lr=3e-3", "a10", "a9", "a", "0"]
    assert sorted(names, key=in_natural_order) == ["0", "a", "a9", "a10", "lr=3e-3", "lr=1e-2"]
