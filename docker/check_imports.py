"""Prove an image: its libraries, their versions, and a run that trains a few steps.

    python docker/check_imports.py cpu
    python docker/check_imports.py gpu

Every package that setup.py asks for is compared with constraints.txt and imported, each in a
process of its own. The GPU libraries load the CUDA driver: where there is none, as on a machine
that only builds images, their versions alone are compared, and nothing is trained; that is said.
Exit code 0 if all of it held.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from hybrid_train.config.supported import (
    is_pinned,
    plain_name,
    read_pins,
)

TREE = Path(__file__).resolve().parents[1]
KINDS = ("cpu", "gpu")
DRIVER = Path("/proc/driver/nvidia/version")
# Modules that are not called like their distribution.
MODULES = {
    "hydra-core": "hydra",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine.pytorch",
}
PLAN = ("check", "experiment=nemotron_h_8b", "processes=64")
TRAINING = ("train", "experiment=tiny_cpu", "data=streams", "train.tokens=2k", "run_dir=run")


def promised(kind: str) -> list[str]:
    """List what the installed package asks for: always, and for its extra `gpu` in that image."""
    extras = {"cpu": (), "gpu": ("gpu",)}[kind]
    names = []
    for line in metadata.requires("hybrid_train") or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if extra is None or extra[1] in extras:
            names.append(plain_name(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]))
    return names


def wrong_version(name: str, pin: str | None, *, rebuilt: bool) -> str:
    """Say what is wrong with the installed version; nothing if it is the pinned one."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
    right = pin is None or is_pinned(found, pin, rebuilt=rebuilt)
    return "" if right else f"{found}, wanted {pin}"


def wrong_import(name: str) -> str:
    """Say why a library cannot be imported; nothing if it can."""
    module = MODULES.get(name, name.replace("-", "_"))
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines()
    reason = said[-1] if said else f"exit code {done.returncode}"
    return "" if done.returncode == 0 else f"cannot be imported: {reason}"


def wrong_libraries(kind: str, *, imports: bool) -> Iterator[str]:
    """Print a line for each library and yield what is wrong."""
    pins = read_pins((TREE / "constraints.txt").read_text())
    for name in promised(kind):
        wrong = wrong_version(name, pins.get(name), rebuilt=kind == "gpu")
        if imports:
            wrong = wrong or wrong_import(name)
        print(f"{name:20} {wrong or metadata.version(name)}", flush=True)
        if wrong:
            yield f"{name}: {wrong}"


def wrong_job(*words: str) -> Iterator[str]:
    """Run a job as a user does, in an empty folder, and yield what it said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "hybrid_train", *words],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    print(f"hybrid-train {' '.join(words)}: exit code {done.returncode}", flush=True)
    if done.returncode:
        yield f"hybrid-train {words[0]}: {done.stderr.strip()[-2000:]}"


def main() -> int:
    """Prove the image and return 1 if anything is wrong."""
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:  # noqa: PLR2004 - the program and one word
        print(f"usage: check_imports.py {'|'.join(KINDS)}", file=sys.stderr)
        return 2
    kind = sys.argv[1]
    runs = kind == "cpu" or DRIVER.exists()
    wrong = list(wrong_libraries(kind, imports=runs))
    wrong += wrong_job(*PLAN)
    if runs:
        wrong += wrong_job(*TRAINING)
    else:
        print("No NVIDIA driver here: nothing was imported and nothing trained; run this again")
        print("where there is one: docker run --gpus all ... python docker/check_imports.py gpu")
    print("\n".join(["", *wrong]) if wrong else f"The {kind} image holds what it promises.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
