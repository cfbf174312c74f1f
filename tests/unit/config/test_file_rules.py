"""Run folders that cannot be made, or not be written into."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid_train.config.rules_of_data import run_dir_can_be_a_folder, what_forbids
from hybrid_train.schema.job_roots import CheckJob
from hybrid_train.schema.train import TrainJob
from tests.unprivileged import modes_count


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write into."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def told(run_dir: Path) -> str:
    with modes_count():
        (problem,) = run_dir_can_be_a_folder(TrainJob(run_dir=str(run_dir)))
    assert (problem.path, problem.value) == ("run_dir", str(run_dir))
    return problem.rule


@pytest.mark.parametrize("below", [".", "run", "a/b/c"])
def test_a_folder_that_this_user_may_not_write_is_named(closed: Path, below: str) -> None:
    assert told(closed / below) == f"this user may not read and write in {closed}"
    planned = CheckJob(run_dir=str(closed / below))  # it may be meant for another machine
    with modes_count():
        assert list(run_dir_can_be_a_folder(planned)) == []


def test_a_folder_that_cannot_be_entered_is_named(closed: Path) -> None:
    closed.chmod(0o600)
    assert told(closed / "run") == f"{closed}/run cannot be reached: Permission denied"


def _file(folder: Path) -> Path:
    (folder / "file").write_text("here")
    return folder / "file"


def _dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


def _loop(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "link")
    return folder / "link" / "run"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_file, "file is a file, not a folder"),
        (lambda folder: _file(folder) / "below" / "it", "file is a file, not a folder"),
        (_dangling, "link is a link that leads nowhere"),
        (lambda folder: _dangling(folder) / "run", "link is a link that leads nowhere"),
        (_loop, "can be no path: Too many levels of symbolic links"),
        (lambda folder: folder / ("x" * 300), "can be no path: File name too long"),
        (lambda folder: folder.joinpath(*["x" * 250] * 16), "can be no path: File name too long"),
        (lambda _: Path("/proc/1/run"), "/proc/1"),
    ],
)
def test_what_stands_in_the_way_is_named(
    make: Callable[[Path], Path], text: str, tmp_path: Path
) -> None:
    assert text in told(make(tmp_path))


@pytest.mark.parametrize("name", ["run", "a/b", "=(,) \N{SNOWMAN}", "x" * 255])
def test_a_folder_that_can_be_made_has_no_problem(name: str, tmp_path: Path) -> None:
    assert what_forbids(tmp_path / name) is None
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert what_forbids(tmp_path / "link" / name) is None


def test_a_path_with_a_nul_is_no_path() -> None:
    assert "can be no path" in str(what_forbids(Path("a\0b")))
