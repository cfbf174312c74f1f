"""Rules about what a student learns from."""

from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config import checks
from hybrid_train.schema.objective import SELF, HiddenStates, NextToken
from hybrid_train.schema.parallel import Parallel, Recompute
from tests.distilled import student_job


def problems(job: Any, processes: int = 1) -> list[str]:
    job.run_dir = "runs/child"
    job.data.kind = "quickstart"
    return [f"{one.path}: {one.rule}" for one in checks.check(job, processes)]


def of(found: list[str], path: str) -> list[str]:
    return [one for one in found if one.startswith(f"{path}:")]


def test_a_teacher_must_be_a_folder_or_a_url(tmp_path: Path) -> None:
    assert of(problems(student_job(tmp_path)), "objective.teacher") == []
    (found,) = of(problems(student_job(tmp_path / "parnet")), "objective.teacher")
    assert "there is no such folder" in found
    assert of(problems(student_job("s3://bucket/runs/parent")), "objective.teacher") == []
    (found,) = of(problems(student_job("s3://")), "objective.teacher")
    assert "must be the URL of a folder" in found


def test_a_student_that_starts_from_nothing_cannot_teach_itself() -> None:
    job = student_job(SELF)
    (found,) = of(problems(job), "objective.teacher")
    assert "needs checkpoint.load=RUN" in found
    job.checkpoint.load = "."
    assert of(problems(job), "objective.teacher") == []


@pytest.mark.parametrize(
    ("given", "path", "words"),
    [
        ({"layers": [1, 9]}, "layers.1", "must be at most"),
        ({"layers": [0]}, "layers.0", "must be at least 1"),
        ({"layers": [1, 1]}, "layers", "twice"),
        ({"layers": [1, 2], "teacher_layers": [3]}, "teacher_layers", "which are 2"),
        ({"layers": [4, 1], "teacher_layers": [30, 3]}, "", ""),
    ],
)
def test_hidden_states_are_those_of_layers_that_there_are(
    given: dict[str, list[int]], path: str, words: str, tmp_path: Path
) -> None:
    found = problems(student_job(tmp_path, hidden=HiddenStates(**given)))
    found = [one for one in found if one.startswith("objective.hidden")]
    assert len(found) == bool(words)
    assert all(one.startswith(f"objective.hidden.{path}: ") and words in one for one in found)


def test_hidden_states_are_not_drawn_where_they_are_another_microbatchs(tmp_path: Path) -> None:
    job = student_job(tmp_path, hidden=HiddenStates(layers=[1]))
    job.parallel = Parallel(recompute=Recompute.full)
    assert of(problems(job), "parallel.recompute")
    job.objective.hidden.layers = []
    assert of(problems(job), "parallel.recompute") == []


def test_experts_of_a_teacher_may_be_split_beside_a_student_without_any(tmp_path: Path) -> None:
    job = student_job(tmp_path)
    job.model.pattern, job.parallel = "M*-", Parallel(expert=2)
    assert of(problems(job, 2), "parallel.expert") == []
    job.objective = NextToken()
    assert of(problems(job, 2), "parallel.expert")
