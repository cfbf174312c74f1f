"""Rules about what a student learns from."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import checks
from hybrid_train.schema.objective import SELF, MtpTarget, NextToken
from hybrid_train.schema.parallel import Parallel
from tests.distilled import student_job


def problems(job: Any, processes: int = 1) -> list[str]:
    job.run_dir = "runs/child"
    job.data.kind = "quickstart"
    return [f"{one.path}: {one.rule}" for one in checks.check(job, processes)]


def of(found: list[str], path: str) -> list[str]:
    return [one for one in found if one.startswith(f"{path}:")]


def test_a_teacher_must_be_a_folder(tmp_path: Path) -> None:
    assert of(problems(student_job(tmp_path)), "objective.teacher") == []
    (found,) = of(problems(student_job(tmp_path / "parnet")), "objective.teacher")
    assert "there is no such folder" in found


def test_a_student_that_starts_from_nothing_cannot_teach_itself() -> None:
    job = student_job(SELF)
    (found,) = of(problems(job), "objective.teacher")
    assert "needs checkpoint.load=RUN" in found
    job.checkpoint.load = "."
    assert of(problems(job), "objective.teacher") == []


@pytest.mark.parametrize("mtp", [MtpTarget.off, MtpTarget.divergence])
def test_a_reduction_does_not_wait_for_depths_that_learn_nothing(
    tmp_path: Path, mtp: MtpTarget
) -> None:
    job = student_job(tmp_path, mtp=mtp)
    job.parallel = Parallel(overlap_grad_reduce=True)
    found = of(problems(job), "parallel.overlap_grad_reduce")
    assert bool(found) is (mtp is MtpTarget.off)


def test_experts_of_a_teacher_may_be_split_beside_a_student_without_any(tmp_path: Path) -> None:
    job = student_job(tmp_path)
    job.model.pattern, job.parallel = "M*-", Parallel(expert=2)
    assert of(problems(job, 2), "parallel.expert") == []
    job.objective = NextToken()
    assert of(problems(job, 2), "parallel.expert")
