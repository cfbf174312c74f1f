"""Which checkpoint a teacher is, and what a run cannot learn from."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hybrid_train.checkpoint import layout
from hybrid_train.distillation.teacher_record import (
    FILE_NAME,
    choose,
    only_moved,
    places,
    read_record,
    require_usable,
    write_record,
)
from hybrid_train.schema.objective import SELF, HiddenStates, MtpTarget, WeighedTeacher
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from tests.distilled import PATTERN, student_job, teacher_folder

TOKENIZER: Any = SimpleNamespace(fingerprint="of all")


def begun(folder: Path, *named: str, **settings: Any) -> Any:
    """The job of a run that has chosen its teachers, and wrote them down."""
    job = student_job(*named, **settings)
    job.run_dir = str(folder / "child")
    Path(job.run_dir).mkdir()
    write_record(Path(job.run_dir), choose(job, goes_on=False))
    return job


def test_the_newest_checkpoint_is_taken_and_that_one_ever_on(tmp_path: Path) -> None:
    parent = teacher_folder(tmp_path / "parent")
    job = begun(tmp_path, str(parent))
    teacher_folder(parent, step=9)
    (again,) = choose(job, goes_on=True)
    assert again.found == layout.Found(layout.path_of(parent, 5), 5)
    (other,) = choose(job, goes_on=False)
    assert other.step == 9


def test_another_checkpoint_in_its_place_is_refused(tmp_path: Path) -> None:
    parent = teacher_folder(tmp_path / "parent")
    job = begun(tmp_path, str(parent))
    place = layout.path_of(parent, 5)
    (place / "weights").write_text("b")
    layout.write_checksums(place, {})
    with pytest.raises(UserError, match=r"step_00000005 is another checkpoint than the one"):
        choose(job, goes_on=True)
    place.rename(parent / "elsewhere")
    with pytest.raises(UserError, match=r"the run learned from .*step_00000005, which is gone"):
        choose(job, goes_on=True)
    (Path(job.run_dir) / FILE_NAME).unlink()
    with pytest.raises(UserError, match="nobody knows which checkpoints"):
        choose(job, goes_on=True)


def test_a_teacher_that_has_moved_is_known_by_its_checksum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = teacher_folder(tmp_path / "parent")
    job = begun(tmp_path, str(parent))
    moved, saved = copy.deepcopy(job), copy.deepcopy(job)
    there = parent.rename(tmp_path / "elsewhere")
    teacher_folder(there, step=9)  # it has trained on meanwhile
    moved.objective.teacher = str(there)
    assert only_moved(saved, moved, Path(job.run_dir))
    with caplog.at_level("INFO"):
        (found,) = choose(moved, goes_on=True)
    assert found.found == layout.Found(layout.path_of(there, 5), 5)
    assert f"the very checkpoint that this run learned from in {parent}" in caplog.text
    with pytest.raises(UserError, match=r"which is gone; .* objective.teacher=FOLDER"):
        choose(job, goes_on=True)
    heavier = student_job(teachers=[WeighedTeacher(checkpoint=str(there), weight=0.5)] * 2)
    assert not only_moved(saved, heavier, Path(job.run_dir))
    place = layout.path_of(there, 5)
    (place / "weights").write_text("b")
    layout.write_checksums(place, {})
    assert not only_moved(saved, moved, Path(job.run_dir))
    with pytest.raises(UserError, match="which is gone"):
        choose(moved, goes_on=True)


def test_a_teacher_behind_a_url_is_where_it_was_fetched_to(tmp_path: Path) -> None:
    url, parent = "s3://bucket/runs/parent", teacher_folder(tmp_path / "parent")
    with pytest.raises(UserError, match="teacher s3://bucket/runs/parent lies behind a URL"):
        choose(student_job(url), goes_on=False)
    (found,) = choose(student_job(url), goes_on=False, fetched={url: parent})
    assert (found.source, found.run_dir, found.step) == (url, str(parent), 5)
    job = student_job(SELF)
    job.checkpoint.load = url
    assert places(job) == [("checkpoint.load", url)]
    assert choose(job, goes_on=False, fetched={url: parent})[0].run_dir == str(parent)


def test_the_student_itself_is_what_it_was_loaded_from(tmp_path: Path) -> None:
    parent = teacher_folder(tmp_path / "parent")
    job = student_job(SELF)
    job.checkpoint.load = str(layout.path_of(parent, 5))
    (found,) = choose(job, goes_on=False)
    assert (found.source, found.run_dir, found.step) == (SELF, str(parent), 5)


def test_a_teacher_of_no_weight_is_not_looked_for(tmp_path: Path) -> None:
    parent = teacher_folder(tmp_path / "parent")
    named = [
        WeighedTeacher(checkpoint="nowhere", weight=0.0),
        WeighedTeacher(checkpoint=str(parent)),
    ]
    assert [one.source for one in choose(student_job(teachers=named), goes_on=False)] == [
        str(parent)
    ]


def test_a_record_is_read_as_it_was_written_and_goes_with_the_teachers(tmp_path: Path) -> None:
    job = begun(tmp_path, str(teacher_folder(tmp_path / "parent")))
    run_dir = Path(job.run_dir)
    chosen = choose(job, goes_on=False)
    assert read_record(run_dir) == chosen
    write_record(run_dir, [])
    assert read_record(run_dir) is None
    (run_dir / FILE_NAME).write_text('[{"source": "a"}]')
    with pytest.raises(UserError, match="is damaged"):
        read_record(run_dir)


def usable(job: Any, tokenizer: Any = TOKENIZER, processes: int = 1) -> None:
    require_usable(choose(job, goes_on=False), [job], tokenizer, processes)


def test_other_tokens_are_refused_by_the_name_of_the_teacher(tmp_path: Path) -> None:
    job = student_job(teacher_folder(tmp_path / "parent"))
    usable(job)
    with pytest.raises(UserError, match=r"parent.* has another tokenizer than the data"):
        usable(job, SimpleNamespace(fingerprint="of nothing"))
    job.model.vocab_size = 60  # fewer: what the teacher has beyond them is padding
    usable(job)
    job.model.vocab_size = 70
    with pytest.raises(UserError, match=r"vocabulary of 61 tokens.*set model.vocab_size=61"):
        usable(job)
    (tmp_path / "parent" / "data.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer that could be compared"):
        usable(job)


def test_depths_that_a_teacher_lacks_are_refused(tmp_path: Path) -> None:
    job = student_job(teacher_folder(tmp_path / "parent"))
    job.model.pattern = f"{PATTERN}/*"
    with pytest.raises(UserError, match=r"has 1 MTP depth, the model of this run 2; choose"):
        usable(job)
    job.objective.mtp = MtpTarget.cross_entropy
    usable(job)


def test_layers_that_a_teacher_lacks_are_refused(tmp_path: Path) -> None:
    job = student_job(teacher_folder(tmp_path / "parent"))
    job.objective.hidden = HiddenStates(layers=[2], teacher_layers=[5])
    with pytest.raises(UserError, match=r"layer 5 of teacher .* which has 4 layers; set"):
        usable(job)
    job.objective.hidden.teacher_layers = [4]
    usable(job)


def test_a_layout_that_a_teacher_cannot_be_split_into_is_refused(tmp_path: Path) -> None:
    job = student_job(teacher_folder(tmp_path / "parent"))
    job.parallel = Parallel(tensor=8)  # of 4 heads
    with pytest.raises(UserError, match=r"has the layout of this run.*\n.*parallel.tensor = 8"):
        usable(job, processes=8)
