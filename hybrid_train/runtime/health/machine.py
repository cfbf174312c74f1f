"""A machine as the checks see it, and what a check finds; a test brings a machine of its own."""

import enum
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hybrid_train.runtime.health.probe import Library
from hybrid_train.runtime.health.speed import DeviceSpeed
from hybrid_train.runtime.optional import State

Figures = Mapping[str, float]  # by name with its unit: "cpu_flops_per_s"
COMMAND_S = 20  # within which any command that is asked answers, or is taken for dead


class Grade(enum.Enum):
    """How bad it is."""

    ok = "ok"
    warning = "warning"  # a run starts, but may be slow, or fail later
    broken = "broken"  # a run does not start


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    grade: Grade
    found: str
    fix: str = ""  # what to type or do; empty if all is well
    figures: Figures = field(default_factory=dict)


def ok(found: str, figures: Figures | None = None) -> Finding:
    """Return that all is well."""
    return Finding(Grade.ok, found, figures=figures or {})


def warning(found: str, fix: str, figures: Figures | None = None) -> Finding:
    """Return what should be fixed."""
    return Finding(Grade.warning, found, fix, figures or {})


def broken(found: str, fix: str) -> Finding:
    """Return what must be fixed."""
    return Finding(Grade.broken, found, fix)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    text: str  # of stdout; of stderr where stdout is empty

    @property
    def first_line(self) -> str:
        """What it said first."""
        return next(iter(self.text.splitlines()), "it says nothing")


def ask(command: Sequence[str]) -> Answer | None:
    """Run a command and return its answer; None if there is no such command."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return Answer(124, f"no answer within {COMMAND_S} s")
    return Answer(done.returncode, (done.stdout.strip() or done.stderr.strip()))


def space(folder: Path) -> tuple[int, int]:
    """Return the bytes of a file system in all and free."""
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


def soft_limit(which: int) -> float:
    """Return a limit of this process, a RLIMIT of `resource`; infinity where there is none."""
    soft, _ = resource.getrlimit(which)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True)
class Machine:
    """All that a check may ask."""

    libraries: Mapping[str, Library]  # by module
    pins: Mapping[str, str] = field(default_factory=dict)  # versions, by distribution
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    folder: Path = field(default_factory=Path.cwd)  # where runs are to be written
    root: Path = Path("/")  # of the files of the system
    python: tuple[int, ...] = sys.version_info[:3]
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    ask: Callable[[Sequence[str]], Answer | None] = ask
    space: Callable[[Path], tuple[int, int]] = space
    soft_limit: Callable[[int], float] = soft_limit
    measure: Callable[[], Sequence[DeviceSpeed]] = tuple

    def text(self, path: str) -> str | None:
        """Return the content of a file of the system; None if it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Tell whether the system has a file or folder."""
        return (self.root / path).exists()

    @cached_property
    def gpus(self) -> Answer | None:
        """What the driver says of its GPUs, a line each; None without nvidia-smi."""
        fields = "index,name,driver_version,memory.total,memory.used"
        return self.ask(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])

    @cached_property
    def has_driver(self) -> bool:
        """Whether a driver of NVIDIA's is loaded, or says that it is."""
        files = self.exists("proc/driver/nvidia/version") or self.exists("dev/nvidia0")
        return files or (self.gpus is not None and self.gpus.code == 0)

    @property
    def hides_gpus(self) -> bool:
        """Whether the user keeps GPUs from this process."""
        return self.environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")

    @property
    def uses_gpus(self) -> bool:
        """Whether a run would go to GPUs here, if all is well."""
        return self.has_driver and not self.hides_gpus

    @property
    def is_nvidias_image(self) -> bool:
        """Whether this is a container with NVIDIA's own build of torch."""
        return "NVIDIA_PYTORCH_VERSION" in self.environment

    @property
    def torch_works(self) -> bool:
        """Whether torch can be imported."""
        library = self.libraries.get("torch")
        return library is not None and library.state is State.working

    def torch_fact(self, name: str) -> object:
        """Return what torch said of itself, a key of `probe.torch_facts`; None if it is broken."""
        library = self.libraries.get("torch")
        return library.facts.get(name) if library else None
