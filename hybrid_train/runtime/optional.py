"""Libraries that a run can do without: which are there, and what to say where one is not.

A library that is absent is fine. One that is installed but cannot be imported is an error: its
owner believes it to be at work. Nothing is imported before it is asked for.
"""

import enum
import functools
import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from hybrid_train.schema.problems import UserError


class State(enum.Enum):
    """What became of a library."""

    absent = "absent"
    working = "working"
    broken = "broken"  # installed, but the import fails


@dataclass(frozen=True)
class Status:
    """State of one library; the version where it is known, the error where it is broken."""

    state: State
    version: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        detail = self.error if self.state is State.broken else self.version
        return f"{self.state.value} ({detail})" if detail else self.state.value


@dataclass(frozen=True)
class OptionalLibrary:
    """How a library is called and how one gets it."""

    distribution: str  # name it is installed under
    install: str  # command to type


# Kernels are compiled against the torch that is there, hence no build isolation.
_NO_ISOLATION = "pip install --no-build-isolation"

LIBRARIES: dict[str, OptionalLibrary] = {
    "transformer_engine": OptionalLibrary(
        "transformer-engine", f"{_NO_ISOLATION} 'transformer-engine[pytorch]'"
    ),
    "mamba_ssm": OptionalLibrary("mamba-ssm", f"{_NO_ISOLATION} mamba-ssm"),
    "causal_conv1d": OptionalLibrary("causal-conv1d", f"{_NO_ISOLATION} causal-conv1d"),
    "apex": OptionalLibrary("apex", f"{_NO_ISOLATION} 'apex @ git+https://github.com/NVIDIA/apex'"),
    "reasoning_gym": OptionalLibrary("reasoning-gym", "pip install reasoning-gym"),
    "tensorboard": OptionalLibrary("tensorboard", "pip install tensorboard"),
    "transformers": OptionalLibrary("transformers", "pip install transformers"),
    "lm_eval": OptionalLibrary("lm-eval", "pip install 'lm-eval>=0.4.13,<0.5'"),
    "wandb": OptionalLibrary("wandb", "pip install wandb"),
}


@functools.cache
def status(name: str) -> Status:
    """Import the library once and tell what came of it.

    Args:
        name: module name, a key of `LIBRARIES`.
    """
    return look(name, LIBRARIES[name].distribution)


def look(module: str, distribution: str) -> Status:
    """Import a module now and tell what came of it, whether or not it is in the table."""
    if not _is_installed(module):
        return Status(State.absent)
    version = _version(distribution)
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension that does not fit raises ImportError, OSError, ...
        return Status(State.broken, version, f"{type(error).__name__}: {error}")
    return Status(State.working, version)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False


def available(name: str) -> bool:
    """Tell whether the library works here; absent is no.

    Raises:
        UserError: if it is broken.
    """
    found = status(name)
    if found.state is State.broken:
        raise UserError(
            f"{name} is installed but cannot be imported: {found.error}\n"
            f"Install it again ({LIBRARIES[name].install}), or remove it "
            f"(pip uninstall {LIBRARIES[name].distribution}): it is optional."
        )
    return found.state is State.working


def require(name: str, feature: str) -> ModuleType:
    """Import the library, which `feature` cannot do without.

    Raises:
        UserError: if it is absent or broken; says how to get it.
    """
    if not available(name):
        raise UserError(
            f"{feature} needs {name}, which is not installed; install it: {LIBRARIES[name].install}"
        )
    return importlib.import_module(name)


def _version(distribution: str) -> str | None:
    """Return the version that was installed; None for a module that nobody installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
