"""Which numbers of nodes a submitted run can take."""

import pytest

from hybrid_train.config import rules_of_cluster
from hybrid_train.config.compose import compose
from hybrid_train.schema.job_roots import SubmitJob
from hybrid_train.schema.problems import ConfigError


def job(*lines: str) -> SubmitJob:
    return compose("submit", ["cluster=slurm_h100", "dry_run=true", *lines])


def nodes(*lines: str) -> int:
    found = job(*lines)
    return rules_of_cluster.asked_nodes(found, found.cluster)


LARGE = "experiment=nemotron_h_56b"  # tensor 8 x pipeline 2, batches of 768


def test_a_plan_of_16_processes_takes_two_nodes_of_8_unless_more_are_named() -> None:
    assert nodes(LARGE) == 2
    six = job(LARGE, "cluster.nodes=6")
    assert rules_of_cluster.asked_processes(six, six.cluster) == 48


def test_a_plan_of_16_processes_takes_four_trays_of_4() -> None:
    assert nodes(LARGE, "cluster=slurm_gb200") == 4


def test_smaller_numbers_are_legal_where_layout_and_batch_come_out_even() -> None:
    found = rules_of_cluster.legal_nodes(job(LARGE, "cluster.nodes=768", "cluster.min_nodes=1"))
    # n nodes make n / 2 data-parallel ranks, which have to divide 768 sequences.
    assert found == [n for n in range(1, 769) if n % 2 == 0 and 768 % (n // 2) == 0]


@pytest.mark.slow
def test_each_legal_number_passes_the_checks_and_no_other_does() -> None:
    found = rules_of_cluster.legal_nodes(job(LARGE, "cluster.nodes=16", "cluster.min_nodes=1"))
    for count in range(1, 17):
        try:
            job(LARGE, f"cluster.nodes={count}")
        except ConfigError:
            assert count not in found
        else:
            assert count in found


def test_without_a_smallest_number_all_nodes_are_needed() -> None:
    assert rules_of_cluster.legal_nodes(job(LARGE, "cluster.nodes=8")) == [8]


def test_a_wrong_number_of_nodes_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as refused:
        job(LARGE, "cluster.nodes=7")
    (problem,) = refused.value.problems
    assert (problem.path, problem.value, problem.nearest) == ("cluster.nodes", 7, 8)
    assert "multiple of 2" in problem.rule


def test_a_phase_with_another_layout_counts_too() -> None:
    layout = "train.phases.3.tensor=8"
    assert nodes(LARGE, layout, "train.phases.3.pipeline=6") == 6
