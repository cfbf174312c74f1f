"""The runner of the GPU check; all of it with plain twins, where there is no network."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.planning.gpu_formats import Gpu
from hybrid_train.schema.precision import GemmFormat
from tests.gpu import check
from tests.gpu.check import ROOT, STAGES, Result, Results, Stage, run_stage
from tests.gpu.stages import one, quantized
from tests.gpu.stages.notes import Notes
from tests.gpu.wheels import plain_name

MACHINE = {"device": "a card", "libraries": {"torch": "2.11.0"}}
MARK = "pytest.mark." + "gpu"  # not spelt out: this file is none of those that it looks for
# What comes with torch, or what it asks for.
OF_TORCH = re.compile(
    "torch|triton|nvidia-.*|cuda-.*|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|setuptools"
    "|sympy|typing-extensions"
)
# A machine without a network has 127.0.0.1, where processes meet; a new room has it switched off.
LOOPBACK = """
import fcntl, os, socket, struct, sys
UP, SET_FLAGS = 1, 0x8914  # IFF_UP, SIOCSIFFLAGS
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", UP))
os.execvp(sys.argv[1], sys.argv[1:])
"""
DRY_LIMIT_S = 900  # of a stage, on a machine that runs other tests
INSTALL = "HYBRID_TRAIN_INSTALL"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make stages of Python code: the runner starts `tests.gpu.stages.one`, which is replaced."""
    package = tmp_path / "tests" / "gpu" / "stages"
    package.mkdir(parents=True)
    monkeypatch.setattr(check, "ROOT", tmp_path)

    def make(code: str) -> Stage:
        (package / "one.py").write_text(f"import sys, os, subprocess, time, json\n{code}\n")
        return Stage("made", 1, "")

    return make


NOTE = "file = open(sys.argv[2], 'a', buffering=1)\n"


def test_a_stage_that_ends_in_order_is_what_it_says(stage: Any, tmp_path: Path) -> None:
    row = '{"row": {"what": "a", "value": 1}}'
    made = stage(
        f"{NOTE}print('{row}', file=file)\nprint('{{\"outcome\": \"passed\"}}', file=file)"
    )
    result = run_stage(made, tmp_path, plain=True, limit_s=30)
    assert (result.outcome, result.rows) == ("passed", [{"what": "a", "value": 1}])


def test_a_stage_that_is_killed_has_failed_and_its_figures_stay(stage: Any, tmp_path: Path) -> None:
    row = '{"row": {"what": "a", "value": 1}}'
    made = stage(f"{NOTE}print('{row}', file=file)\nos.kill(os.getpid(), 9)")
    result = run_stage(made, tmp_path, plain=True, limit_s=30)
    assert (result.outcome, len(result.rows)) == ("failed", 1)
    assert "code -9" in result.reason


def test_a_stage_over_its_time_is_ended_with_its_children(stage: Any, tmp_path: Path) -> None:
    alive = tmp_path / "child"
    child = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(.05)"
    )
    row = '{"row": {"what": "a", "value": 1}}'
    made = stage(
        f"{NOTE}print('{row}', file=file)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    )
    result = run_stage(made, tmp_path, plain=True, limit_s=5)
    assert (result.outcome, len(result.rows)) == ("timed out", 1)
    assert result.seconds < 30
    alive.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not alive.exists(), "its child still runs"


def test_a_check_that_is_ended_takes_its_stage_along(stage: Any, tmp_path: Path) -> None:
    alive = tmp_path / "child"
    stage(f"import pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(.05)")
    code = f"""
import pathlib, sys
from tests.gpu import check
check.ROOT = pathlib.Path({str(tmp_path)!r})
check.STAGES = check.STAGES[:1]
check.look_at_machine = lambda **_: {MACHINE}
sys.argv = ["check", "--out", {str(tmp_path / "out")!r}]
check.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not alive.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 1
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists(), "the stage still runs"


def test_results_are_read_again_and_those_of_another_device_are_refused(tmp_path: Path) -> None:
    first = Results(tmp_path, MACHINE)
    first.add(Result("scan", "passed", 12.0, "mamba-ssm"))
    again = Results(tmp_path, MACHINE)
    assert again.by_stage == first.by_stage
    again.add(Result("doctor", "failed", 3.0, reason="no driver"))
    text = (tmp_path / "table.md").read_text()
    assert text.index("| doctor | failed | 3 |") < text.index("| scan | passed | 12 | mamba-ssm |")
    with pytest.raises(SystemExit, match="another card"):
        Results(tmp_path, {**MACHINE, "device": "another card"})


def test_a_second_call_runs_what_is_missing_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def passed(stage: Stage, *_: Any, **__: Any) -> Result:
        ran.append(stage.name)
        if len(ran) == 3:
            raise KeyboardInterrupt  # as a call that is cut
        return Result(stage.name, "passed", 1.0)

    monkeypatch.setattr(check, "run_stage", passed)
    monkeypatch.setattr(check, "look_at_machine", lambda **_: MACHINE)
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        check.main()
    names = [one.name for one in STAGES]
    assert check.main() == 0
    assert ran == [*names[:3], *names[2:]]
    assert check.main() == 0
    assert len(ran) == len(names) + 1
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path), "--again"])
    check.main()
    assert ran[len(names) + 1 :] == names


def test_the_table_has_every_file_of_gpu_tests_and_every_stage_its_work() -> None:
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")
             if MARK in path.read_text()}  # fmt: skip
    assert {stage.name for stage in STAGES if stage.test} == files
    assert {stage.name for stage in STAGES if not stage.test} == set(one.WORK)
    for name in one.WORK:
        assert callable(one.work_of(name))


def test_the_upper_half_fits_into_eight_minutes() -> None:
    """The first half of the stages that are not files of tests, and what stands between."""
    planned, done = 0, []
    for stage in STAGES:
        planned += stage.planned_s
        if planned <= 480:
            done.append(stage.name)
        assert stage.planned_s < check.LIMIT_S
    assert {"doctor", "scan", "gemms", "steps_4b", "test_native_precision"} <= set(done)
    assert len(done) >= len(STAGES) / 2


def test_a_figure_beyond_its_limit_fails_and_so_does_one_that_is_no_number(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes", plain=True)
    notes.row("fine", 1.0, limit=1.0)
    notes.row("large", 2.0, limit=1.0)
    notes.row("none", float("nan"), limit=1.0)
    assert [text.partition(":")[0] for text in notes.beyond] == ["large", "none"]


def test_formats_that_the_card_lacks_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU alone asks; the dry run goes past it."""
    monkeypatch.setattr(quantized.te, "present_gpu", lambda: Gpu("H200", (9, 0), (13, 0)))
    notes = Notes(tmp_path / "notes", plain=False)
    usable = [one for one in GemmFormat if quantized.usable(notes, one)]
    assert {GemmFormat.fp8_tensorwise, GemmFormat.fp8_blockwise} <= set(usable)
    assert not {GemmFormat.mxfp8, GemmFormat.nvfp4} & set(usable)
    said = (tmp_path / "notes").read_text()
    assert "H200 (compute capability 9.0) does not compute nvfp4" in said


# the whole ---------------------------------------------------------------------------------------


def without_a_network(*command: str) -> list[str]:
    """The words that run a command where there is no network; skip where that is not allowed."""
    room = ["unshare", "--map-root-user", "-n", sys.executable, "-c", LOOPBACK]
    tried = shutil.which("unshare") and subprocess.run([*room, "true"], check=False)
    if not tried or tried.returncode:
        pytest.skip("unshare -n is not there or not permitted here")
    return [*room, *command]


def dry_run(python: Path, folder: Path, *stages: str) -> dict[str, Result]:
    """Run the check without a network, in the copy of the tree that a folder holds."""
    words = ["--plain", "--limit-s", str(DRY_LIMIT_S), "--out", str(folder / "out"), *stages]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        without_a_network("bash", str(folder / "tests" / "gpu" / "run.sh"), *words),
        env={**kept, "PYTHON": str(python), "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=DRY_LIMIT_S * len(STAGES), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "out" / "results.json").read_text())
    assert found["machine"]["device"] == check.PLAIN
    return {one["stage"]: Result(**one) for one in found["stages"]}


def require_dry(results: dict[str, Result]) -> None:
    """Every stage passed as a plain twin, but files of tests, which say what they lack."""
    for stage in STAGES:
        if stage.name not in results:
            continue
        result = results[stage.name]
        if stage.test:
            assert result.outcome == "skipped"
            assert "CUDA" in result.reason
        else:
            assert result.outcome == "passed", dataclasses.asdict(result)
            assert result.rows
        assert result.flavour.startswith(check.PLAIN)


@pytest.mark.slow
def test_a_few_plain_twins_pass_without_a_network(source_copy: Path) -> None:
    results = dry_run(Path(sys.executable), source_copy, "scan", "gemms", "memory", "test_ops")
    assert set(results) == {"scan", "gemms", "memory", "test_ops"}
    require_dry(results)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get(INSTALL) != "1", reason=f"{INSTALL}=1 makes a fresh environment, for minutes"
)
def test_all_plain_twins_pass_with_carried_wheels_alone(source_copy: Path, tmp_path: Path) -> None:
    """A fresh Python that has torch and what came with it; everything else was carried."""
    wheels = [sys.executable, str(source_copy / "tests" / "gpu" / "wheels.py"), "collect"]
    carried = str(source_copy / "gpu_wheels")
    subprocess.run([*wheels, "--without-cuda", carried], check=True)
    python = bare_torch(tmp_path / "venv")
    results = dry_run(python, source_copy)
    assert set(results) == {stage.name for stage in STAGES}
    require_dry(results)


def bare_torch(folder: Path) -> Path:
    """Make an environment that has torch and what it requires, by links to what is here."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for found in metadata.distributions():
        if not OF_TORCH.fullmatch(plain_name(found.name)):
            continue
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))
    return folder / "bin" / "python"
