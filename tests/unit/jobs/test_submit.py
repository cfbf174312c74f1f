"""hybrid-train submit without a SLURM: what it prints, refuses and writes."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.config import compose, frozen
from hybrid_train.jobs import cli, code_snapshot, submit
from hybrid_train.schema.problems import ConfigError
from tests.jobs.command import ROOT
from tests.sampled import sampled

LAUNCH = ROOT / "launch"
TINY = ("experiment=tiny_cpu", "cluster=slurm_cpu")
PUBLISHED = ("nemotron_h_56b", "nemotron3_super", "nemotron3_ultra")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may have a SLURM; these tests see none."""
    monkeypatch.setattr(submit, "has_slurm", lambda: False)


def dry_run(capsys: pytest.CaptureFixture[str], *lines: str) -> str:
    """Return the script."""
    code = cli.main(["submit", "--dry-run", *lines])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("experiment", sampled(PUBLISHED, PUBLISHED[-1]))
def test_a_published_recipe_is_rendered_without_torch(experiment: str) -> None:
    code = (
        "import sys; from hybrid_train.jobs import cli; code = cli.main(sys.argv[1:]); "
        "sys.stderr.write(str({'torch', 'megatron', 'numpy'} & set(sys.modules))); sys.exit(code)"
    )
    words = ["submit", "--dry-run", f"experiment={experiment}", "cluster=slurm_b200"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("set()")
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "data.train" in done.stderr  # still to be set, and said so


def test_the_script_is_bash_and_has_no_blank_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(dry_run(capsys, *TINY, "cluster.nodes=2", f"run_dir={tmp_path}/run"))
    assert not re.search(r"__[A-Z]", script.read_text())
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_options_follow_the_settings_and_unset_ones_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = dry_run(
        capsys,
        *TINY,
        "cluster.partition=long",
        "cluster.nodes=2",
        "cluster.min_nodes=1",
        "cluster.time_limit='2:00:00'",
        "cluster.signal_s=300",
        "cluster.sbatch=['--mem=0']",
        "cluster.setup=['module load cuda']",
        "cluster.environment.NAME='two words'",
    )
    lines = script.splitlines()
    for line in (
        "#SBATCH --partition=long",
        "#SBATCH --nodes=1-2",
        "#SBATCH --time=2:00:00",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --mem=0",
        "module load cuda",
        "export NAME='two words'",
        "legal_nodes=(1 2) # with which the batch and the layout come out even",
    ):
        assert line in lines
    assert "--account" not in script
    assert "--gpus" not in script
    # With this option SLURM 22.05 always gives the fewest nodes of a range.
    assert not any(line.startswith("#SBATCH --ntasks") for line in lines)


def test_a_container_mounts_the_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = "cluster.container.image='nvcr.io#nvidia/pytorch:26.01-py3'"
    run_dir = f"{tmp_path}/run"
    mounts = "cluster.container.mounts=['/data:/data']"
    script = dry_run(capsys, *TINY, image, mounts, f"run_dir={run_dir}")
    assert f"--container-mounts={run_dir}:{run_dir},/data:/data" in script
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in script
    assert "python=python3" in script


def test_a_sweep_is_an_array_with_a_run_folder_for_each_element(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "sweep"
    words = ("--multirun", *TINY, "train.seed=1,2,3", f"run_dir={run_dir}")
    script = dry_run(capsys, *words)
    assert "#SBATCH --array=0-2" in script
    assert f"#SBATCH --output={run_dir}/%a/logs/slurm_%j.log" in script
    assert f'run_dir={run_dir}/"$SLURM_ARRAY_TASK_ID"' in script


def test_a_sweep_over_the_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--dry-run", "--multirun", *TINY, "cluster.nodes=1,2")
    assert "an array has one cluster" in said


def test_all_problems_are_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(
        capsys,
        *("--dry-run", "experiment=tiny_cpu", "cluster=slurm_cpu", "cluster.time_limit=soon"),
        *("train.global_batch=5", "cluster.environment.MY_SECRET=x", "optimizer.beta3=1"),
    )
    for part in ("time_limit", "train.global_batch", "MY_SECRET", "optimizer.beta3"):
        assert part in said


def test_without_a_cluster_the_choices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "slurm_b200, slurm_cpu" in refusal(capsys, "--dry-run", "experiment=tiny_cpu")


def test_the_folder_of_another_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    frozen.freeze(compose.compose("train", ["experiment=tiny_cpu", f"run_dir={run_dir}"]), run_dir)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')  # something was trained there
    said = refusal(capsys, "--dry-run", *TINY, f"run_dir={run_dir}", "train.seed=7")
    assert "belongs to a run with another config" in said
    assert "train.seed: 1234 there, 7 here" in said


def partition(**changes: object) -> dict[str, submit.Partition]:
    known = {"name": "batch", "is_default": True, "nodes": 4, "limit_s": 3600, **changes}
    return {"batch": submit.Partition(**known)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("cluster.partition=bach", "cluster.partition"),
        ("cluster.nodes=5", "cluster.nodes"),
        ("cluster.time_limit='2:00:00'", "cluster.time_limit"),
    ],
)
def test_what_the_partition_cannot_give_is_refused(
    line: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "has_slurm", lambda: True)
    monkeypatch.setattr(submit, "partitions", partition)
    batch = "train.global_batch=40"
    lines = [*TINY, batch, "cluster.time_limit=30", line, "dry_run=true"]
    with pytest.raises(ConfigError) as refused:
        submit._checked(lines, is_array=False)
    (problem,) = refused.value.problems
    assert problem.path == path


def test_nothing_is_written_without_a_slurm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(capsys, *TINY, f"run_dir={tmp_path}/run")
    assert "sbatch was not found" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A run folder, as it is when sbatch has taken the job."""
    monkeypatch.setattr(submit, "has_slurm", lambda: True)
    monkeypatch.setattr(submit, "partitions", partition)
    monkeypatch.setattr(submit, "require_acceptable", lambda script: None)
    monkeypatch.setattr(submit, "queue_script", lambda script: "17")
    monkeypatch.setattr(submit, "job_state", lambda job: "RUNNING" if job == "17" else None)
    monkeypatch.setenv("WANDB_API_KEY", "dGhpcyBpcyBhIHNlY3JldA")
    run_dir = tmp_path / "run"
    words = [*TINY, f"run_dir={run_dir}", "cluster.time_limit=30"]
    assert cli.main(["submit", *words]) == 0
    assert "job 17" in capsys.readouterr().out
    return run_dir


def test_a_submission_leaves_config_code_and_script(submitted: Path) -> None:
    assert frozen.load(submitted).run_dir == str(submitted)
    assert (submitted / "launch" / "job.sbatch").is_file()
    assert (submitted / "code" / "hybrid_train" / "__main__.py").is_file()
    assert (submitted / "code" / "conf" / "train.yaml").is_file()
    assert (submitted / "code" / "launch" / "slurm" / "node.sh").is_file()
    assert not list(submitted.rglob("__pycache__"))


def test_others_cannot_read_the_run_folder_and_no_credential_is_in_it(submitted: Path) -> None:
    assert stat.S_IMODE(submitted.stat().st_mode) & 0o027 == 0
    files = [path for path in submitted.rglob("*") if path.is_file()]
    secret = os.environ["WANDB_API_KEY"].encode()
    assert not [path for path in files if secret in path.read_bytes()]


def test_a_run_that_is_queued_is_not_submitted_twice(
    submitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, *TINY, f"run_dir={submitted}", "cluster.time_limit=30")
    assert "job 17 of this folder is RUNNING" in said


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_snapshot_says_which_commit_it_is_and_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "hybrid_train").mkdir(parents=True)
    (root / "hybrid_train" / "__init__.py").write_text('"""Package."""\n')
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(code_snapshot.hybrid_train, "__file__", f"{root}/hybrid_train/__init__.py")
    (root / "hybrid_train" / "new.py").write_text("NEW = 1\n")
    (root / "hybrid_train" / "big.log").write_text("not code\n")
    code_snapshot.write_snapshot(tmp_path / "code", LAUNCH)
    assert sorted(path.name for path in (tmp_path / "code" / "hybrid_train").iterdir()) == [
        "__init__.py",
        "new.py",
    ]
    version = (tmp_path / "code" / "VERSION").read_text().splitlines()
    assert re.fullmatch(r"commit [0-9a-f]{40}", version[0])
    assert version[1:] == ["changed since", "?? hybrid_train/new.py"]


def test_a_snapshot_takes_the_place_of_an_older_one_as_a_whole(tmp_path: Path) -> None:
    old = tmp_path / "code" / "hybrid_train" / "gone.py"
    old.parent.mkdir(parents=True)
    old.touch()
    code_snapshot.write_snapshot(tmp_path / "code", LAUNCH)
    assert not old.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
