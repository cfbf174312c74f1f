"""What teachers and stored targets take of a run, of config and files alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.distillation.target_folder import HEADER, Header, Part
from hybrid_train.jobs.teacher_plan import TeacherPlan, plan_teachers
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.formats import STORED_TARGETS, write_stamp
from hybrid_train.schema.objective import HiddenStates, MtpTarget, NextToken, WeighedTeacher
from tests.distilled import student_job, teacher_folder
from tests.tiny import VOCAB

ROWS = 64  # of the embedding, padded


def planned(job: Any) -> TeacherPlan:
    return plan_teachers(job, lay_out(job), ROWS, 1)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return teacher_folder(tmp_path / "parent")


def test_a_teacher_computes_what_the_loss_asks_of_it(parent: Path) -> None:
    job = student_job(parent)
    length = job.train.sequence_length
    by_kind = counts.flops_per_token(job.model, ROWS, length).by_kind
    assert list(planned(job).flops) == [sum(by_kind.values())]
    job.objective.mtp = MtpTarget.cross_entropy
    assert list(planned(job).flops) == [sum(by_kind.values()) - by_kind["mtp"]]
    twice = [WeighedTeacher(checkpoint=str(parent))] * 2
    both = student_job(teachers=twice, mtp=MtpTarget.off)
    assert list(planned(both).flops) == [2 * (sum(by_kind.values()) - by_kind["mtp"])]
    assert planned(both).storable is None  # a folder has the targets of one teacher


def test_what_is_stored_is_the_rows_of_training_and_those_that_validations_ask_for(
    parent: Path,
) -> None:
    job = student_job(parent)
    found = planned(job).storable
    assert found is not None
    (phase,), train = lay_out(job), job.train
    assert found.rows == phase.length.sequences  # no data, so no validation either
    assert found.tokens == found.rows * train.sequence_length
    hidden, top = found.kinds
    width = 2 * job.model.hidden_size * 4  # its own depth, too
    head = VOCAB * job.model.hidden_size * 4
    assert hidden.bytes == found.tokens * width + found.rows * 16 + head
    assert (top.top_k, top.bytes) == (64, found.tokens * (64 * 8 + 4) + found.rows * 16)
    by_kind = counts.flops_per_token(job.model, ROWS, train.sequence_length).by_kind
    without = sum(by_kind.values()) - 2 * by_kind["head"]  # hidden states need no head
    assert hidden.flops == found.tokens * without
    job.data.validation = ["held_out"]
    more = planned(job).storable
    assert more is not None
    assert more.rows - found.rows == train.validation_batches * train.global_batch


def test_only_what_the_objective_can_read_is_offered(parent: Path) -> None:
    found = planned(student_job(parent, temperature=2.0)).storable
    assert found is not None
    assert [one.top_k for one in found.kinds] == [None]
    between = HiddenStates(layers=[1], teacher_layers=[1])
    assert planned(student_job(parent, hidden=between)).storable is None


def test_a_run_without_a_teacher_has_nothing_of_it(tmp_path: Path) -> None:
    job = student_job()
    job.objective = NextToken()
    assert planned(job) == TeacherPlan(flops=[0])
    found = planned(student_job(tmp_path / "elsewhere"))
    assert "does not exist" in found.unknown
    assert list(found.flops) == [0]


def test_targets_that_are_read_are_measured_and_no_teacher_is_counted(tmp_path: Path) -> None:
    header = Header(
        what="top_k", top_k=4, dtype="float32", vocab_size=VOCAB, mtp_depths=0, tokenizer="",
        data={}, seed=0, parts=[Part("train-0", "train", 16, 0, 8, 8)],
        teacher={"source": "runs/parent", "run_dir": "", "step": 5, "checksum": ""},
    )  # fmt: skip
    (tmp_path / HEADER).write_text(json.dumps(asdict(header)))
    write_stamp(tmp_path, STORED_TARGETS)
    (tmp_path / "train-0").mkdir()
    (tmp_path / "train-0" / "00000000.safetensors").write_bytes(b"12345")
    found = planned(student_job(targets=str(tmp_path)))
    assert found.read is not None
    assert found.read.header == header
    assert found.read.bytes == sum(
        one.stat().st_size for one in tmp_path.rglob("*") if one.is_file()
    )
    assert (found.flops, found.teachers, found.storable) == ([0], (), None)
