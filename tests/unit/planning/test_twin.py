"""The twin of a run keeps every kind of split and of layer, breaks no rule, and is small."""

import pytest

from hybrid_train.config.checks import check
from hybrid_train.config.compose import compose
from hybrid_train.planning.degrees import data_parallel
from hybrid_train.planning.phases import lay_out
from hybrid_train.planning.twin import MOST_PROCESSES, in_words, twin_of
from hybrid_train.schema.objective import Distill, NextToken
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.pruning import Depth, Mask
from hybrid_train.schema.train import TrainJob
from tests.masking import FreezeEmbedding
from tests.tiny import EVERY_KIND, tiny_job

PUBLISHED = {
    "nemotron_h_56b": 1536,
    "nemotron3_nano": 512,
    "nemotron3_super": 1024,
    "nemotron3_ultra": 1536,
}
DEGREES = ("tensor", "pipeline", "context", "expert")


def published() -> list[tuple[TrainJob, int]]:
    jobs = {
        name: compose("check", [f"experiment={name}", f"processes={number}"])
        for name, number in PUBLISHED.items()
    }
    return [(one.job, PUBLISHED[name]) for name, job in jobs.items() for one in lay_out(job)]


def test_twins_of_published_layouts_keep_their_splits_and_rules() -> None:
    for job, processes in published():
        twin, number = twin_of(job, processes)
        assert number <= MOST_PROCESSES
        broken = [one.path for one in check(twin, number)]
        assert [path for path in broken if not path.startswith("data.")] == []  # it reads none
        for name in DEGREES:
            assert getattr(twin.parallel, name) == min(2, getattr(job.parallel, name))
        small, whole = parse(twin.model.pattern), parse(job.model.pattern)
        assert set(small.main) == set(whole.main)
        assert (small.mtp, small.mtp_depths) == (whole.mtp, whole.mtp_depths)


@pytest.mark.parametrize(("processes", "number", "data"), [(4, 4, 1), (8, 8, 2), (64, 8, 2)])
def test_what_is_left_is_data_parallel_where_it_was(processes: int, number: int, data: int) -> None:
    job = tiny_job("MEM*M-", parallel=Parallel(tensor=2, pipeline=2))
    twin, found = twin_of(job, processes)
    assert (found, data_parallel(twin.parallel, found)) == (number, data)


def test_each_virtual_stage_has_every_kind_of_layer() -> None:
    job = tiny_job(EVERY_KIND, parallel=Parallel(pipeline=2, virtual_pipeline=2))
    twin, number = twin_of(job, 2)
    assert twin.model.pattern == "ME*-|ME*-|ME*-|ME*-/*E/*E"
    assert in_words(twin, number).endswith(
        "on 2 processes: tensor 1 x pipeline 2 x context 1 x data 1, expert 1"
    )


def test_a_student_has_no_teacher_in_its_twin() -> None:
    job = tiny_job(objective=Distill(teacher="runs/parent", moe_aux_loss_scale=0.3))
    twin, _ = twin_of(job, 1)
    assert twin.objective == NextToken(moe_aux_loss_scale=0.3)


def test_a_mask_which_is_of_the_sizes_of_the_run_is_not_in_its_twin() -> None:
    own = FreezeEmbedding()
    twin, _ = twin_of(tiny_job(edits=[Mask(depth=Depth(drop=["2"])), own]), 1)
    assert twin.edits == [own]
