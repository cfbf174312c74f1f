"""Checks of Python and of the libraries: there, importable, of the version that is pinned."""

import functools
from collections.abc import Callable

from hybrid_train.config.pins import is_pinned, plain_name
from hybrid_train.runtime import optional
from hybrid_train.runtime.health.findings import Finding, broken, ok, warning
from hybrid_train.runtime.health.machine import Machine
from hybrid_train.runtime.health.probe import REQUIRED, Library
from hybrid_train.runtime.optional import State

PYTHON = (3, 12)  # as in setup.py
INSTALL = "make setup, or: pip install -c constraints.txt -e ."
# What is of use on a GPU alone.
KERNELS = ("transformer_engine", "mamba_ssm", "causal_conv1d", "apex")
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
    pin = machine.pins.get(distribution)
    rebuilt = module == "torch" and machine.is_nvidias_image
    return _version(library, distribution, pin, rebuilt=rebuilt)


def _version(
    library: Library, distribution: str, pin: str | None, *, rebuilt: bool = False
) -> Finding:
    """Compare the version of a library that works with the pinned one."""
    version = library.version or "of unknown version"
    if library.version is None or pin is None or is_pinned(version, pin, rebuilt=rebuilt):
        return ok(version)
    return warning(
        f"{version}; the project is developed with {pin}",
        f"pip install -c constraints.txt {distribution}",
    )


def _kernels(machine: Machine, module: str) -> Finding:
    library, known = machine.libraries[module], optional.LIBRARIES[module]
    install = known.install.replace("pip install", "pip install -c constraints.txt")
    if library.state is State.broken:
        return broken(
            f"installed, but cannot be imported: {library.error}",
            f"{install} --force-reinstall --no-deps; or: pip uninstall {known.distribution}",
        )
    if library.state is State.working:
        pin = machine.pins.get(plain_name(known.distribution))
        return _version(library, known.distribution, pin)
    if not machine.uses_gpus:
        return ok(f"not installed, {_NOT_HERE}")
    if module == "apex" and machine.libraries["transformer_engine"].state is State.working:
        return ok("not installed, not needed: Transformer Engine has what it would be used for")
    return warning("not installed; slower parts of PyTorch take its place", install)
