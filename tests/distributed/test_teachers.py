"""A teacher that is no number ends the run on every process, by its name."""

from pathlib import Path

import pytest
import torch

from hybrid_train.runtime import cpu
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.problems import UserError
from tests.distilled import student_job, write_teacher
from tests.distributed.launch import run_distributed
from tests.tiny import MEGATRON_WARNINGS, alone, batch_of, some_rows, tiny_engine

pytestmark = MEGATRON_WARNINGS


def _spoil_and_step(teacher: Path) -> str:
    cpu.install()
    from hybrid_train.megatron.data_parallel import build_groups

    job = student_job(teacher)
    job.parallel, job.train.microbatch = Parallel(pipeline=2), 1
    groups = build_groups(job.parallel, timeout_s=60)
    engine = tiny_engine(job, groups)
    (one,) = engine.objective._teachers
    if groups.pp.rank() == 1:  # the first stage makes nothing that anyone looks at
        next(one.network.chunks[0].decoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="its hidden states are not finite") as caught:
        engine.step(iter(batch_of(row[None]) for row in some_rows()), tokens_seen=0)
    assert caught.value.on_all_ranks
    return str(caught.value)


def test_every_process_hears_of_a_teacher_that_is_no_number(tmp_path: Path) -> None:
    with alone() as groups:
        teacher = write_teacher(tmp_path / "teacher", groups)
    words = run_distributed(_spoil_and_step, 2, teacher)
    assert len(set(words)) == 1
    assert f"teacher {teacher}" in words[0]
