"""Limits of the settings of a cluster, and of a run on it."""

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.schema.cluster import Cluster, Container, seconds
from hybrid_train.schema.job_roots import SubmitJob
from hybrid_train.schema.problems import ConfigError, Problem, collect

CLUSTERS = sorted(file.stem for file in (conf_dir() / "cluster").glob("*.yaml"))


def paths(cluster: Cluster) -> list[str]:
    return [problem.path for problem in collect(cluster)]


def problems(*lines: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as refused:
        compose("submit", ["experiment=tiny_cpu", "cluster=slurm_cpu", *lines])
    return {problem.path: problem for problem in refused.value.problems}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("1:30:00", 5400),
        ("2-12", 216_000),
        ("1-00:30", 88_200),
        ("1-01:01:01", 90_061),
        ("1h", None),
        ("", None),
        ("1:2:3:4", None),
        ("-5", None),
    ],
)
def test_a_time_is_read_as_sbatch_reads_it(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("name", CLUSTERS)
def test_each_cluster_of_conf_is_sound(name: str) -> None:
    device = "cpu" if name == "slurm_cpu" else "auto"
    job = compose(
        "submit",
        [
            "experiment=tiny_cpu",
            f"cluster={name}",
            f"runtime.device={device}",
            "train.global_batch=64",
        ],
    )
    assert isinstance(job, SubmitJob)


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        (Cluster(time_limit="5"), "time_limit"),  # less than the 10 minutes of signal_s
        (Cluster(time_limit="soon"), "time_limit"),
        (Cluster(nodes=2, min_nodes=3), "min_nodes"),
        (Cluster(gpus_per_node=0), "processes_per_node"),
        (Cluster(gpus_per_node=4, processes_per_node=8), "processes_per_node"),
        (Cluster(partition="two words"), "partition"),
        (Cluster(environment={"HF_TOKEN": "x"}), "environment"),
        (Cluster(environment={"WANDB_API_KEY": "x"}), "environment"),
        (Cluster(environment={"2X": "x"}), "environment"),
        (Cluster(sbatch=["exclusive"]), "sbatch.0"),
        (Cluster(sbatch=["--mem=0", "--nodes=4"]), "sbatch.1"),
        (Cluster(container=Container(mounts=["/data:/data"])), "container.mounts"),
        (Cluster(container=Container(image="x", mounts=["/a:/a,/b:/b"])), "container.mounts.0"),
        (Cluster(port=65000), "port"),
    ],
)
def test_a_setting_that_sbatch_would_not_take_is_named(wrong: Cluster, path: str) -> None:
    assert paths(wrong) == [path]


def test_a_sound_cluster_has_no_problems() -> None:
    container = Container(image="nvcr.io#nvidia/pytorch:26.01-py3", mounts=["/data:/data:ro"])
    sound = Cluster(nodes=4, min_nodes=2, container=container, sbatch=["--mem=0"])
    assert paths(sound) == []


def test_gpus_that_the_run_does_not_use_are_a_problem_and_missing_ones_too() -> None:
    assert problems("cluster.gpus_per_node=8", "train.global_batch=64").keys() == {"runtime.device"}
    assert problems("runtime.device=cuda").keys() == {"runtime.device"}


def test_a_run_folder_that_slurm_cannot_write_its_log_into_is_refused() -> None:
    assert "run_dir" in problems("run_dir='runs/a b'")


def test_a_variable_is_added_by_its_name() -> None:
    job = compose(
        "submit", ["experiment=tiny_cpu", "cluster=slurm_cpu", "cluster.environment.NCCL_DEBUG=1"]
    )
    assert job.cluster.environment == {"NCCL_DEBUG": "1"}
