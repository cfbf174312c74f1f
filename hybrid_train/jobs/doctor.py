"""The job `doctor`: checks the machine; a line for each check, with the command that fixes it."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping

from hybrid_train.config.launcher import require_alone
from hybrid_train.config.supported import pinned
from hybrid_train.megatron import written_for
from hybrid_train.runtime.health import gpus, probe, system
from hybrid_train.runtime.health.machine import Finding, Grade, Machine, broken, ok, warning
from hybrid_train.runtime.health.probe import REQUIRED
from hybrid_train.runtime.replacements import to_do
from hybrid_train.schema.job_roots import DoctorJob
from hybrid_train.schema.units import counted

Checks = Mapping[str, Callable[[Machine], Finding]]

MACHINE_CHECKS: Checks = {
    "Python": system.python,
    "torch": system.torch,
    "CUDA": gpus.cuda,
    "driver": gpus.driver,
    "GPUs": gpus.gpus,
    "megatron-core": system.megatron,
    "Transformer Engine": system.kernels("transformer_engine"),
    "mamba-ssm": system.kernels("mamba_ssm"),
    "causal-conv1d": system.kernels("causal_conv1d"),
    "apex": system.kernels("apex"),
    "transformers": system.transformers,
    "NCCL": gpus.nccl,
    **system.LIMIT_CHECKS,
    "SLURM": system.slurm,
    "container": system.container,
}
MEASUREMENTS: Checks = {
    "GEMM": gpus.gemm,
    "all-reduce": gpus.all_reduce,
}
MODULES = (*REQUIRED, *system.KERNELS, "transformers")  # what the checks want imported
_NAME_WIDTH, _GRADE_WIDTH = 20, 9  # columns


def run(job: DoctorJob) -> int:
    """Examine the machine; return 1 if anything is broken."""
    require_alone("doctor")
    machine = Machine(libraries=probe.libraries(MODULES), pins=pinned())
    machine = dataclasses.replace(machine, measure=gpus.measurement(machine))
    checks = {**CHECKS, **(MEASUREMENTS if job.measure else {})}
    found = findings(machine, checks)
    return _tell_json(found) if job.json else _tell_lines(found)


def findings(machine: Machine, checks: Checks) -> Iterator[tuple[str, Finding]]:
    """Run checks one after the other; one that fails itself is broken, and the rest go on."""
    for name, check in checks.items():
        try:
            yield name, check(machine)
        except Exception as error:  # a machine that is out of order may raise anything
            fault = f"the check itself failed: {type(error).__name__}: {error}"
            yield name, broken(fault, "look at this part by hand, and report the fault")


def written_for_these(_: Machine) -> Finding:
    """Check that our replacements were written for the libraries that are installed."""
    read = sum(len(row.read) for row in written_for.TABLE)
    if not (lines := to_do(written_for.TABLE)):
        return ok(f"{read} functions and classes of torch and megatron-core are those we know")
    return warning(
        f"{len(lines)} of {read} functions and classes are not those we know: {'; '.join(lines)}",
        "install the pinned versions (pip install -c constraints.txt ...), or read them again",
    )


CHECKS: Checks = {**MACHINE_CHECKS, "written for": written_for_these}


def _tell_lines(found: Iterator[tuple[str, Finding]]) -> int:
    """Print each finding as soon as it is there, and the verdict."""
    grades = []
    for name, finding in found:
        grades.append(finding.grade)
        words = " ".join(finding.found.split())  # an error may have several lines
        _say(f"{name:{_NAME_WIDTH}}{finding.grade.value:{_GRADE_WIDTH}}{words}")
        if finding.fix:
            _say(f"{'':{_NAME_WIDTH}}{'':{_GRADE_WIDTH}}-> {finding.fix}")
    worst = worst_of(grades)
    number = grades.count(Grade.warning), grades.count(Grade.broken)
    checks, warnings = counted(len(grades), "check"), counted(number[0], "warning")
    _say(f"\n{checks}: {warnings}, {number[1]} broken")
    return int(worst is Grade.broken)


def _tell_json(found: Iterator[tuple[str, Finding]]) -> int:
    listed = list(found)
    worst = worst_of([finding.grade for _, finding in listed])
    checks = [
        {
            "check": name,
            "grade": finding.grade.value,
            "found": finding.found,
            "fix": finding.fix,
            "figures": dict(finding.figures),
        }
        for name, finding in listed
    ]
    _say(json.dumps({"verdict": worst.value, "checks": checks}, indent=2))
    return int(worst is Grade.broken)


def worst_of(grades: list[Grade]) -> Grade:
    """Return the worst grade; ok if there is none."""
    order = list(Grade)
    return max(grades, key=order.index, default=Grade.ok)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
