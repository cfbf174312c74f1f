"""Checks of GPUs, driver, CUDA of torch and NCCL, and of how fast devices are."""

import functools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence

from hybrid_train.config.supported import is_pinned
from hybrid_train.runtime.health import speed
from hybrid_train.runtime.health.machine import Finding, Machine, broken, ok, warning
from hybrid_train.runtime.health.speed import DeviceSpeed
from hybrid_train.schema.units import show_bytes

# The oldest driver for each major version of CUDA (NVIDIA, CUDA Toolkit release notes, "CUDA
# Toolkit and minimum required driver version for minor version compatibility", Linux).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # of the PCI bus: vendor, class of display controllers
_BUSY_MIB = 1024  # of a GPU's memory; an idle driver takes less
_RECOVER = "see dmesg | grep -i nvrm; load the driver (modprobe nvidia) or start the machine again"
_NO_TORCH = broken("not known: torch does not work", "fix torch first, see its line")
_BUILD = "install a torch that is built for CUDA: pip install --force-reinstall -c constraints.txt "
SLOW = 0.8  # of the median of its siblings; GPUs of one kind differ by a few percent
_NOTHING_TO_TIME = broken("not measured: torch does not work", "fix torch first, see its line")


def cuda(machine: Machine) -> Finding:
    """Check that torch is built for CUDA where there is a GPU."""
    if machine.torch_fact("fault"):
        return broken(f"torch cannot ask for it: {machine.torch_fact('fault')}", _RECOVER)
    version = machine.torch_fact("cuda")
    if not machine.torch_works and machine.uses_gpus:
        return _NO_TORCH
    if version is None and machine.uses_gpus:
        return broken("torch is built without it, and there is a GPU", f"{_BUILD}torch")
    if version is None:
        return ok("not in this torch, not needed here: no GPU")
    return ok(f"{version}, the version that torch is built for")


def driver(machine: Machine) -> Finding:
    """Check that a driver answers and is new enough for torch's CUDA."""
    answer = machine.gpus
    if not machine.has_driver:
        return _no_driver(machine)
    if answer is not None and answer.code:
        return broken(f"nvidia-smi fails: {answer.first_line}", _RECOVER)
    version = _driver_version(machine)
    if version is None:
        return warning("loaded, of unknown version", "install nvidia-smi, which comes with it")
    built = machine.torch_fact("cuda")
    needed = OLDEST_DRIVER.get(int(str(built).partition(".")[0])) if built else None
    if needed and int(version.partition(".")[0]) < needed:
        found = f"{version} is older than CUDA {built} asks for, which torch is built for"
        fix = f"install driver {needed} or newer, or a torch for an older CUDA"
        # NVIDIA's images bring libraries with which some older drivers of data centres do.
        return warning(found, fix) if machine.torch_fact("devices") else broken(found, fix)
    return ok(version)


def _no_driver(machine: Machine) -> Finding:
    if any(_nvidia_devices(machine)):
        return warning(
            "none, but a GPU of NVIDIA's is on the bus",
            "install the driver; in a container, hand the GPUs in: docker run --gpus all ...",
        )
    return ok("none, not needed here: no GPU")


def _nvidia_devices(machine: Machine) -> Iterator[str]:
    """Yield the GPUs of NVIDIA's on the PCI bus."""
    for device in sorted((machine.root / "sys/bus/pci/devices").glob("*")):
        place = device.relative_to(machine.root)
        vendor, kind = machine.text(f"{place}/vendor"), machine.text(f"{place}/class")
        if vendor == _NVIDIA and (kind or "").startswith(_DISPLAY):
            yield device.name


def _driver_version(machine: Machine) -> str | None:
    if rows := _rows(machine):
        return rows[0][2]
    found = re.search(
        r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", machine.text("proc/driver/nvidia/version") or ""
    )
    return found[1] if found else None


def _rows(machine: Machine) -> list[list[str]]:
    """Return what nvidia-smi says: index, name, driver, memory and used memory in MiB."""
    if machine.gpus is None or machine.gpus.code:
        return []
    rows = [line.split(", ") for line in machine.gpus.text.splitlines()]
    return [row for row in rows if len(row) == 5]  # noqa: PLR2004 - the columns that were asked for


def gpus(machine: Machine) -> Finding:
    """Check that torch sees the GPUs, that they are of one kind, and that they are free."""
    if not machine.has_driver:
        return ok("none")
    if machine.hides_gpus:
        return ok("hidden: CUDA_VISIBLE_DEVICES is empty")
    if not machine.torch_works:
        return _NO_TORCH
    names = machine.torch_fact("devices")
    if not isinstance(names, list) or not names:
        return broken(
            "the driver is there, but torch sees no GPU",
            "python -c 'import torch; torch.cuda.init()' says why; in a container: --gpus all",
        )
    return _as_seen(machine, names)


def _as_seen(machine: Machine, names: list[str]) -> Finding:
    kinds = sorted(set(names))
    found = f"{len(names)} x {', '.join(kinds)}"
    if len(kinds) > 1:
        return warning(found, "use those of one kind: CUDA_VISIBLE_DEVICES=0,1,...")
    busy = [
        f"GPU {row[0]} ({show_bytes(int(row[4]) << 20)} of {show_bytes(int(row[3]) << 20)})"
        for row in _rows(machine)
        if row[4].isdecimal() and int(row[4]) > _BUSY_MIB
    ]
    if busy:
        return warning(f"{found}; in use: {', '.join(busy)}", "nvidia-smi shows by which processes")
    return ok(found)


def nccl(machine: Machine) -> Finding:
    """Check the library of collectives between GPUs."""
    version = machine.torch_fact("nccl")
    if not machine.uses_gpus:
        return ok(f"{version or 'none'}, not needed here: processes on CPUs talk through gloo")
    if not machine.torch_works:
        return _NO_TORCH
    if not isinstance(version, str):
        return broken("torch has none, and there is a GPU", f"{_BUILD}torch")
    pin = machine.pins.get("nvidia-nccl-cu13")
    if pin and not machine.is_nvidias_image and not is_pinned(version, pin):
        fix = "pip install -c constraints.txt nvidia-nccl-cu13"
        return warning(f"{version}; the project is developed with {pin}", fix)
    return ok(version)


def measurement(machine: Machine) -> Callable[[], Sequence[DeviceSpeed]]:
    """Return what measures the devices of a machine, once however often it is asked."""
    devices = machine.torch_fact("devices")
    if machine.uses_gpus and isinstance(devices, list) and devices:
        return functools.cache(lambda: speed.measure("cuda", len(devices), threads=1))
    threads = max(1, machine.cores // speed.CPU_PROCESSES)
    return functools.cache(lambda: speed.measure("cpu", speed.CPU_PROCESSES, threads=threads))


def gemm(machine: Machine) -> Finding:
    """Check that every device multiplies right, and none much slower than its siblings."""
    if not machine.torch_works:
        return _NOTHING_TO_TIME
    speeds = machine.measure()
    if errors := [f"{one.device}: {one.gemm_error}" for one in speeds if one.gemm_error]:
        return broken("; ".join(errors), "keep these devices out of runs: CUDA_VISIBLE_DEVICES")
    rates = {one.device: one.flops or 0.0 for one in speeds}
    figures = {f"{name}_flops_per_s": rate for name, rate in rates.items()}
    if next(iter(rates)).startswith("cpu"):
        whole = sum(rates.values())
        text = f"{whole / 1e9:.0f} GFLOP/s in float32 by {len(rates)} processes at once"
        return ok(text, {"cpu_flops_per_s": whole})
    median = statistics.median(rates.values())
    listed = ", ".join(f"{rate / 1e12:.0f}" for rate in rates.values())
    found = f"{listed} TFLOP/s in bfloat16"
    if slow := [name for name, rate in rates.items() if rate < SLOW * median]:
        return warning(
            f"{found}; {', '.join(slow)} is slower than {SLOW:.0%} of the median",
            "nvidia-smi -q -d PERFORMANCE,TEMPERATURE,CLOCK,ECC says what holds it back",
            figures,
        )
    return ok(found, figures)


def all_reduce(machine: Machine) -> Finding:
    """Check that the devices reach each other and add up right."""
    if not machine.torch_works:
        return _NOTHING_TO_TIME
    speeds = machine.measure()
    if errors := [f"{one.device}: {one.reduce_error}" for one in speeds if one.reduce_error]:
        return broken("; ".join(errors), _how_to_fix(speeds))
    rates = [one.bytes_per_s for one in speeds if one.bytes_per_s is not None]
    library = "gloo" if speeds[0].device.startswith("cpu") else "NCCL"
    if not rates:
        return ok(f"{library} works; one device has nobody to tell")
    slowest = min(rates)
    between = f"between {len(speeds)} {'processes' if library == 'gloo' else 'GPUs'}"
    found = f"{slowest / 1e9:.3g} GB/s on the bus {between} ({library})"
    return ok(found, {"all_reduce_bytes_per_s": slowest})


def _how_to_fix(speeds: Sequence[DeviceSpeed]) -> str:
    if speeds[0].device.startswith("cpu"):
        return "name the network interface: export GLOO_SOCKET_IFNAME=lo (ip link lists them)"
    return "NCCL_DEBUG=INFO says more; export NCCL_SOCKET_IFNAME=..., or NCCL_P2P_DISABLE=1"
