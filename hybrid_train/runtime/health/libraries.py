"""Checks of Python and of the libraries: there, importable, of a version that was tried."""

import functools
from collections.abc import Callable

from hybrid_train.config.supported import LIBRARIES, plain_name
from hybrid_train.runtime import optional
from hybrid_train.runtime.health.machine import (
    Finding,
    Machine,
    broken,
    ok,
    warning,
)
from hybrid_train.runtime.health.probe import REQUIRED, Library
from hybrid_train.runtime.optional import State

PYTHON = (3, 12)  # as in setup.py
INSTALL = "make setup, or: pip install -c constraints.txt -e ."
# What is of use on a GPU alone.
KERNELS = ("transformer_engine", "mamba_ssm", "causal_conv1d", "apex")
_TRANSFORMERS = "transformers"
_NOT_HERE = "not needed here: no GPU"


def python(machine: Machine) -> Finding:
    """Check the version of Python."""
    version = ".".join(map(str, machine.python))
    if machine.python[:2] != PYTHON:
        wanted = ".".join(map(str, PYTHON))
        return broken(
            f"{version}; the package is for {wanted}",
            f"install Python {wanted} and name it: make PYTHON=/path/to/python{wanted} setup",
        )
    return ok(version)


def torch(machine: Machine) -> Finding:
    """Check PyTorch."""
    return _required(machine, "torch")


def megatron(machine: Machine) -> Finding:
    """Check Megatron-Core."""
    return _required(machine, "megatron.core")


def transformers(machine: Machine) -> Finding:
    """Check transformers, which tests and users of exports compare with."""
    library, known = machine.libraries[_TRANSFORMERS], optional.LIBRARIES[_TRANSFORMERS]
    if library.state is State.absent:
        return ok("not installed, needed for comparisons with Hugging Face alone")
    if library.state is State.broken:
        return _broken(library, known)
    return _version(library, _TRANSFORMERS)


def kernels(module: str) -> Callable[[Machine], Finding]:
    """Return the check of a library of GPU kernels."""
    return functools.partial(_kernels, module=module)


def _required(machine: Machine, module: str) -> Finding:
    library, distribution = machine.libraries[module], REQUIRED[module]
    if library.state is State.absent:
        return broken("not installed", INSTALL)
    if library.state is State.broken:
        again = f"pip install --force-reinstall -c constraints.txt {distribution}"
        return broken(f"installed, but cannot be imported: {library.error}", again)
    rebuilt = module == "torch" and machine.is_nvidias_image
    return _version(library, distribution, rebuilt=rebuilt)


def _version(library: Library, distribution: str, *, rebuilt: bool = False) -> Finding:
    """Hold the version of a library that works against the table of those that were tried."""
    version = library.version or "of unknown version"
    known = LIBRARIES.get(distribution)
    if library.version is None or known is None:
        return ok(version)
    fault = known.fault(version, rebuilt=rebuilt)
    if not fault:
        return ok(version)
    found, fix = f"{version}, {fault}", f"pip install -c constraints.txt {distribution}"
    return broken(found, fix) if known.others_refused else warning(found, fix)


def _broken(library: Library, known: optional.OptionalLibrary) -> Finding:
    install = _pinned(known)
    return broken(
        f"installed, but cannot be imported: {library.error}",
        f"{install} --force-reinstall --no-deps; or: pip uninstall {known.distribution}",
    )


def _pinned(known: optional.OptionalLibrary) -> str:
    """Return the command that installs a library in the version of constraints.txt."""
    return known.install.replace("pip install", "pip install -c constraints.txt")


def _kernels(machine: Machine, module: str) -> Finding:
    library, known = machine.libraries[module], optional.LIBRARIES[module]
    if library.state is State.broken:
        return _broken(library, known)
    if library.state is State.working:
        return _version(library, plain_name(known.distribution))
    if not machine.uses_gpus:
        return ok(f"not installed, {_NOT_HERE}")
    if module == "apex" and machine.libraries["transformer_engine"].state is State.working:
        return ok("not installed, not needed: Transformer Engine has what it would be used for")
    return warning("not installed; slower parts of PyTorch take its place", _pinned(known))
