"""`hybrid-train doctor` as a command: its lines, its JSON, its exit code."""

import json
import os
from pathlib import Path

import pytest

from hybrid_train.jobs.doctor import CHECKS, MEASUREMENTS
from tests.jobs.command import ROOT, finish, start

NAMES = [*CHECKS, *MEASUREMENTS]


@pytest.fixture
def broken_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mamba_ssm on the path whose import fails."""
    (tmp_path / "mamba_ssm.py").write_text("raise ImportError('selective_scan_cuda.so: no GPU')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))


@pytest.mark.slow
def test_every_check_is_a_line_and_this_machine_can_train() -> None:
    done = finish(start("doctor", cold=True))
    assert done.code == 0, done.said
    lines = [line for line in done.out.splitlines() if line and not line.startswith(" ")]
    told = {name: line for name in NAMES for line in lines if line.startswith(f"{name}  ")}
    assert list(told) == NAMES
    assert "GFLOP/s" in told["GEMM"] or "TFLOP/s" in told["GEMM"]
    assert lines[-1].startswith(f"{len(NAMES)} checks: ")
    assert lines[-1].endswith("0 broken")
    assert "Traceback" not in done.said


@pytest.mark.slow
def test_json_is_one_object_with_every_check() -> None:
    done = finish(start("doctor", "--json", cold=True))
    assert done.code == 0, done.said
    told = json.loads(done.out)
    assert [check["check"] for check in told["checks"]] == NAMES
    assert told["verdict"] in ("ok", "warning")
    grades = {check["grade"] for check in told["checks"]}
    assert grades <= {"ok", "warning"}
    figures = {name: value for check in told["checks"] for name, value in check["figures"].items()}
    assert figures["disk_free_bytes"] > 0
    assert any(name.endswith("flops_per_s") and value > 0 for name, value in figures.items())


@pytest.mark.usefixtures("broken_library")
def test_a_broken_library_is_told_with_the_way_out_and_the_exit_code_is_1() -> None:
    done = finish(start("doctor", "measure=false", cold=True))
    assert done.code == 1
    lines = done.out.splitlines()
    (place,) = (n for n, line in enumerate(lines) if line.startswith("mamba-ssm "))
    assert lines[place].split()[1] == "broken"
    assert "ImportError: selective_scan_cuda.so: no GPU" in lines[place]
    assert "pip uninstall mamba-ssm" in lines[place + 1]
    assert lines[-1].startswith(f"{len(CHECKS)} checks: ")
    assert lines[-1].endswith(", 1 broken")
    assert "Traceback" not in done.said


@pytest.mark.slow
def test_under_torchrun_it_is_refused() -> None:
    done = finish(start("doctor", processes=2, cold=True))
    assert done.code != 0
    assert "doctor runs in one process" in done.err
    assert "GEMM" not in done.out


def test_json_of_a_job_that_has_none_is_refused() -> None:
    done = finish(start("train", "experiment=tiny_cpu", "--json"))
    assert done.code == 2
    assert "json" in done.err
