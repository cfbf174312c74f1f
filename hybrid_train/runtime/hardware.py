"""What a process can say of the machine it is on: processor, cores, memory, GPUs."""

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import psutil


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def node() -> dict[str, Any]:
    """Describe this machine as plain data: cores that this process may use, all its memory."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
    }


def gpus() -> list[dict[str, Any]]:
    """List the kinds of GPUs that torch sees, with their number."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    kinds = Counter((one.name, one.total_memory) for one in seen)
    return [
        {"name": name, "count": count, "memory_bytes": memory}
        for (name, memory), count in kinds.items()
    ]
