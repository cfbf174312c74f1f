"""The checks of a GPU machine, stage by stage: `make gpu-check`.

    python -m tests.gpu.check [--plain] [--again] [--out gpu_check] [STAGE ...]

Each stage is a process of its own that is ended, with its children, when its time is over. The
order is by worth: a call that is cut after eight minutes has done the upper half of the table, and
the next call goes on with what is missing. What came out stands in results.json, put in place
whole after each stage, and as a table in table.md.

Without a GPU `--plain` runs the plain twins on the CPU at tiny sizes, which shows that the program
works, and nothing of a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUT = ROOT / "gpu_check"
LIMIT_S = 90.0
GRACE_S = 2.0  # from the signal that asks a stage to end to the one that does not
PLAIN = "plain twin, CPU"
FAILED = ("failed", "timed out")


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        name: to be typed, and the function in `stages/` or the test file that it is.
        planned_s: what it should take on an H200, start of Python and torch included.
        shows: what it is for.
        test: whether it is a file of tests.
    """

    name: str
    planned_s: int
    shows: str
    test: bool = False


# By worth for the time. Compiled kernels stay on the disk: the first stages warm the later ones.
STAGES = (
    Stage("doctor", 30, "libraries, driver, GEMM rate of the card"),
    Stage("scan", 50, "mamba-ssm's scan against ours: values, gradients, time"),
    Stage("gemms", 30, "quantized GEMMs of Transformer Engine against emulated ones"),
    Stage("steps_4b", 75, "step time, MFU, memory at the width of Nemotron-H 4B, 4k to 32k"),
    Stage("test_native_precision", 75, "quantized models, audit, FP8 weights", test=True),
    Stage("audit", 35, "what the audit says against the kernels that the profiler saw"),
    Stage("memory", 40, "bytes that a step keeps against what `check` counts"),
    Stage("steps_moe", 75, "the same with a quarter of the experts of Nano 3"),
    Stage("fp8_gather", 40, "weights kept in FP8: losses and bytes against bfloat16"),
    Stage("steps_8b", 75, "the same at the width of Nemotron-H 8B"),
    Stage("test_ops", 60, "kernels of mamba-ssm and causal-conv1d against ours", test=True),
    Stage("checkpoint", 45, "a run from the CPU to the GPU and back"),
    Stage("test_fused_adam", 40, "optimizer state in fewer bits against FusedAdam", test=True),
    Stage("test_packed", 40, "documents of a packed row do not see each other", test=True),
    Stage("test_profiling", 30, "memory snapshots, marks, traces", test=True),
    Stage("test_captured_steps", 60, "whole steps in a CUDA graph against none", test=True),
    Stage("test_health", 30, "the measurement of `doctor`", test=True),
    Stage("test_checkpoint", 60, "the loss curve of a run that moves between devices", test=True),
)


@dataclass
class Result:
    """What became of a stage."""

    stage: str
    outcome: str  # passed, failed, skipped, timed out
    seconds: float
    flavour: str = ""  # whose kernels ran
    reason: str = ""  # of a skip or a failure
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""  # date and time


class Results:
    """results.json: the machine, and the result of each stage that has ended."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        """Go on with the results that a folder has, if they are of this machine."""
        self._path = folder / "results.json"
        self._table = folder / "table.md"
        self.machine = machine
        self.by_stage: dict[str, Result] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            found = json.loads(self._path.read_text())
            if found["machine"]["device"] != machine["device"]:
                sys.exit(
                    f"{self._path} has results of {found['machine']['device']}, and this is "
                    f"{machine['device']}: name another folder with --out, or move that one away"
                )
            self.by_stage = {one["stage"]: Result(**one) for one in found["stages"]}

    def add(self, result: Result) -> None:
        """Write the results with one more; whole or not at all."""
        self.by_stage[result.stage] = result
        stages = [self.by_stage[one.name] for one in STAGES if one.name in self.by_stage]
        content = {"machine": self.machine, "stages": [asdict(one) for one in stages]}
        put(self._path, json.dumps(content, indent=1) + "\n")
        put(self._table, "\n".join(table(self.machine, stages)) + "\n")


def put(path: Path, text: str) -> None:
    """Replace a file by another at once."""
    half = path.with_suffix(".half")
    half.write_text(text)
    half.replace(path)


def table(machine: dict[str, Any], results: list[Result]) -> Iterator[str]:
    """Yield the lines of table.md: a row for each stage, then the figures of each."""
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    yield f"# GPU check: {machine['device']}\n\n{libraries}\n"
    yield "| stage | outcome | s | flavour | what came out |\n|---|---|---|---|---|"
    for one in results:
        told = one.reason or f"{len(one.rows)} figures" if one.rows or one.reason else ""
        yield f"| {one.stage} | {one.outcome} | {one.seconds:.0f} | {one.flavour} | {told} |"
    missing = [one.name for one in STAGES if one.name not in {done.stage for done in results}]
    if missing:
        yield f"\nNot run yet: {', '.join(missing)}."
    for one in results:
        if one.rows:
            yield f"\n## {one.stage}\n\n| what | value | at most | |\n|---|---|---|---|"
            yield from (row_of_table(row) for row in one.rows)


def row_of_table(row: dict[str, Any]) -> str:
    limit = "" if row["limit"] is None else f"{row['limit']:.4g}"
    beyond = " **beyond**" if not row["ok"] else ""
    return f"| {row['what']} | {figure(row)} | {limit}{beyond} | {row['note']} |"


def figure(row: dict[str, Any]) -> str:
    value = row["value"]
    if value is None:
        return str(row["unit"])
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{shown} {row['unit']}".strip()


def look_at_machine(*, plain: bool, limit_s: float) -> dict[str, Any]:
    """Ask a process what it sees; the present one stays free of torch."""
    code = "from tests.gpu.stages.machine import tell; tell()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True,
            text=True, timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        sys.exit(f"torch was not imported within {limit_s:.0f} s")
    if done.returncode:
        sys.exit(f"torch cannot be imported:\n{done.stderr}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if plain:
        return {**machine, "device": PLAIN}
    if machine["device"] is None:
        sys.exit(
            "torch sees no GPU here; check the driver (nvidia-smi). "
            "`make gpu-check ARGS=--plain` tries the program out on the CPU."
        )
    return machine


def environment() -> dict[str, str]:
    """What processes of stages find: this tree first, and no library that asks the network."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def run_stage(stage: Stage, folder: Path, *, plain: bool, limit_s: float) -> Result:
    """Run a stage; what it noted before it was ended counts."""
    notes, log = folder / f"{stage.name}.notes.jsonl", folder / f"{stage.name}.log"
    notes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.stages.one", stage.name, str(notes)]
    command += ["--plain"] if plain else []
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        try:
            process.wait(timeout=limit_s)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    result = result_of(stage, notes, seconds)
    if not ended:
        result.outcome, result.reason = "timed out", f"ended after {limit_s:.0f} s; see {log.name}"
    elif result.outcome == "failed" and not result.reason:
        result.reason = f"ended with code {process.returncode}; see {log.name}"
    return result


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a stage has started, too: the group of processes that it is the leader of."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue


def result_of(stage: Stage, notes: Path, seconds: float) -> Result:
    """Read what a stage noted; without a last word it has failed."""
    lines = notes.read_text().splitlines() if notes.is_file() else []
    found: dict[str, Any] = {"outcome": "failed", "rows": []}
    for line in filter(None, lines):
        try:
            note = json.loads(line)
        except json.JSONDecodeError:  # it was ended while it wrote
            continue
        if "row" in note:
            found["rows"].append(note["row"])
        else:
            found.update(note)
    ended = time.strftime("%Y-%m-%d %H:%M:%S")
    return Result(stage=stage.name, seconds=round(seconds, 1), ended=ended, **found)


def line_of(result: Result) -> str:
    """The line of a stage on the console."""
    told = result.reason.splitlines()[0] if result.reason else headline(result.rows)
    return (
        f"{result.stage:22} {result.outcome:10} {result.seconds:5.0f} s  "
        f"{result.flavour or '-'}: {told}"
    )


def headline(rows: list[dict[str, Any]]) -> str:
    """The first figures of a stage that say most: those without a limit, else the number."""
    shown = [f"{row['what']} {figure(row)}" for row in rows if row["headline"]]
    shown += [f"{row['what']} skipped" for row in rows if row["unit"] == "skipped"]
    return "; ".join(shown) or f"{len(rows)} figures within their limits"


def main() -> int:
    """Run what is missing; return 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="run these, done or not")
    parser.add_argument("--plain", action="store_true", help="plain twins on the CPU, tiny sizes")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of a stage; 90")
    parser.add_argument("--again", action="store_true", help="run all stages anew")
    parser.add_argument("--out", type=Path, help="folder of results; gpu_check or gpu_check/plain")
    given = parser.parse_args()
    by_name = {one.name: one for one in STAGES}
    if unknown := [name for name in given.stages if name not in by_name]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(by_name)}")
    # So that what is sent to end the check ends its stage: the group is another one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; a second call goes on"))
    folder = (given.out or (OUT / "plain" if given.plain else OUT)).absolute()
    results = Results(folder, look_at_machine(plain=given.plain, limit_s=given.limit_s))
    wanted = [by_name[name] for name in given.stages] or [
        one for one in STAGES if given.again or one.name not in results.by_stage
    ]
    print(f"{results.machine['device']}; {len(wanted)} of {len(STAGES)} stages to run", flush=True)
    for stage in wanted:
        results.add(run_stage(stage, folder, plain=given.plain, limit_s=given.limit_s))
        print(line_of(results.by_stage[stage.name]), flush=True)
    print(f"{folder / 'table.md'} and results.json have all figures")
    return int(any(one.outcome in FAILED for one in results.by_stage.values()))


if __name__ == "__main__":
    sys.exit(main())
