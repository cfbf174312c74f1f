"""What the machine of a GPU check is: device, memory, versions; and whose kernels can run on it."""

import json
import platform
from importlib import metadata
from typing import Any

LIBRARIES = (
    "torch", "triton", "megatron-core", "transformer-engine", "transformer-engine-torch",
    "mamba-ssm", "causal-conv1d",
)  # fmt: skip


def tell() -> None:
    """Print what there is, as the last line of the output."""
    import torch

    device, memory, capability = None, 0, None
    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        device, memory = seen.name, seen.total_memory
        capability = f"{seen.major}.{seen.minor}"
    found = {
        "device": device, "memory_bytes": memory, "capability": capability,
        "cuda": torch.version.cuda, "python": platform.python_version(), "libraries": libraries(),
    }  # fmt: skip
    print(json.dumps(found))


def libraries() -> dict[str, str]:
    """The versions that are installed, or that there is none."""
    return {name: version_of(name) for name in LIBRARIES}


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def flavour(kernels: dict[str, str]) -> str:
    """Say in one cell of a table whose kernels a model was built of (`BuiltModel.kernels`)."""
    parts = {
        "linear": kernels["linear layers, norms, experts"],
        "attention": kernels["attention"],
        "Mamba": kernels["Mamba scan and convolution"],
        "GEMMs": kernels.get("quantized GEMMs", ""),
    }
    return "; ".join(f"{part} {whose}" for part, whose in parts.items() if whose)


def card_bytes(plain: bool) -> int:
    """The memory of the card; for plain twins one that a few tiny layers fill."""
    if plain:
        return 24 * 10**6
    import torch

    total: Any = torch.cuda.get_device_properties(0).total_memory
    return int(total)
