"""Checks of speed: a matrix product on each device, and an all-reduce over all of them."""

import functools
import statistics
from collections.abc import Callable, Sequence

from hybrid_train.runtime.health import speed
from hybrid_train.runtime.health.findings import Finding, broken, ok, warning
from hybrid_train.runtime.health.machine import Machine
from hybrid_train.runtime.health.speed import DeviceSpeed

SLOW = 0.8  # of the median of its siblings; GPUs of one kind differ by a few percent
_NO_TORCH = broken("not measured: torch does not work", "mend torch first, see its line")


def measurement(machine: Machine) -> Callable[[], Sequence[DeviceSpeed]]:
    """Return what measures the devices of a machine, once however often it is asked."""
    devices = machine.torch_fact("devices")
    if machine.uses_gpus and isinstance(devices, list) and devices:
        return functools.cache(lambda: speed.measure("cuda", len(devices), threads=1))
    threads = max(1, machine.cores // speed.CPU_PROCESSES)
    return functools.cache(lambda: speed.measure("cpu", speed.CPU_PROCESSES, threads=threads))


def matrix_product(machine: Machine) -> Finding:
    """Check that every device multiplies right, and none much slower than its siblings."""
    if not machine.torch_works:
        return _NO_TORCH
    speeds = machine.measure()
    if errors := [f"{one.device}: {one.product_error}" for one in speeds if one.product_error]:
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
        return _NO_TORCH
    speeds = machine.measure()
    if errors := [f"{one.device}: {one.reduce_error}" for one in speeds if one.reduce_error]:
        return broken("; ".join(errors), _how_to_mend(speeds))
    rates = [one.bytes_per_s for one in speeds if one.bytes_per_s is not None]
    library = "gloo" if speeds[0].device.startswith("cpu") else "NCCL"
    if not rates:
        return ok(f"{library} works; one device has nobody to tell")
    slowest = min(rates)
    between = f"between {len(speeds)} {'processes' if library == 'gloo' else 'GPUs'}"
    found = f"{slowest / 1e9:.3g} GB/s on the bus {between} ({library})"
    return ok(found, {"all_reduce_bytes_per_s": slowest})


def _how_to_mend(speeds: Sequence[DeviceSpeed]) -> str:
    if speeds[0].device.startswith("cpu"):
        return "name the network interface: export GLOO_SOCKET_IFNAME=lo (ip link lists them)"
    return "NCCL_DEBUG=INFO says more; export NCCL_SOCKET_IFNAME=..., or NCCL_P2P_DISABLE=1"
