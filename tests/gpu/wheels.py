"""Wheels for a machine that has torch and a GPU and no network: collected, cut, joined, installed.

    python tests/gpu/wheels.py collect FOLDER            # with a network: loads of at most 60 MB
    python tests/gpu/wheels.py join FOLDER               # without: checks hashes, puts together
    python tests/gpu/wheels.py install FOLDER SITE       # what Python lacks, into the folder SITE
    python tests/gpu/wheels.py compile FOLDER NAME SITE  # a source package, for one kind of GPU

A load is a folder FOLDER/load_N, to be carried by itself; FOLDER/wheels.json lists all of it. What
was collected once is listed beside this program, without the files; a download must have the hash
that it had then. What comes with torch is not carried. Joining and installing need Python alone.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("wheels.json")
LOAD_BYTES = 60 * 10**6
BLOCK_BYTES = 2**20
# Found as wheels, at the versions of constraints.txt: what training with its plot of losses, its
# tests, mamba-ssm and Transformer Engine import beside torch. Preparation of data is left out.
FOUND = (
    "annotated-doc", "annotated-types", "anyio", "certifi", "click", "contourpy", "cycler",
    "einops", "execnet", "fonttools", "h11", "hf-xet", "httpcore2", "httpx2", "huggingface-hub",
    "hydra-core", "hypothesis", "idna", "iniconfig", "kiwisolver", "markdown-it-py", "matplotlib",
    "mdurl", "megatron-core", "numpy", "omegaconf", "orjson", "packaging", "pillow", "pluggy",
    "psutil", "pydantic", "pydantic-core", "pygments", "pyparsing", "pytest", "python-dateutil",
    "pyyaml", "regex", "rich", "safetensors", "sentencepiece", "shellingham", "six",
    "sortedcontainers", "tokenizers", "tqdm", "transformer-engine", "transformer-engine-cu13",
    "transformers", "truststore", "typer", "typing-inspection", "tzdata", "xxhash", "zstandard",
)  # fmt: skip
# Only Transformer Engine's torch part asks for these, so constraints.txt has none of them.
ALSO = {
    "ml-dtypes": "0.6.0", "nvdlfw-inspect": "0.2.2", "nvidia-cudnn-frontend": "1.32.0",
    "onnx": "1.23.2", "onnx-ir": "1.1.0", "onnxscript": "0.7.2",
}  # fmt: skip
# Source packages, and the variables that they are built with; the last two need a compiler of CUDA.
BUILT = {
    "antlr4-python3-runtime": {},
    "mamba-ssm": {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"},
    "transformer-engine-torch": {"NVTE_PYTORCH_FORCE_BUILD": "TRUE"},
    "causal-conv1d": {"CAUSAL_CONV1D_FORCE_BUILD": "TRUE"},
}
COMPILED = ("transformer-engine-torch", "causal-conv1d")  # carried as sources, compiled there
# What a GPU alone can load, with what it asks for.
FOR_GPUS = (
    "transformer-engine", "transformer-engine-cu13", "mamba-ssm", *COMPILED, *ALSO,
)  # fmt: skip
# Another version of these would be another program, so an installed one is not enough.
EXACT = (
    "antlr4-python3-runtime", "causal-conv1d", "hydra-core", "mamba-ssm", "megatron-core",
    "omegaconf", "pytest", "transformer-engine", "transformer-engine-cu13",
    "transformer-engine-torch",
)  # fmt: skip
# mamba-ssm imports the kernels of Mamba-1 at once; none of ours is called, so nothing stands in.
EMPTY_MODULE = "selective_scan_cuda.py"


def plain_name(name: str) -> str:
    """Write the name of a distribution the one way that names are compared in (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def versions() -> dict[str, str]:
    """The version of everything that is carried."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and line[0] != "#")
    pins = {plain_name(name): version.strip() for name, version in pairs}
    return {**{name: pins[name] for name in (*FOUND, *BUILT)}, **ALSO}


# collect -----------------------------------------------------------------------------------------


def collect(folder: Path, left_out: tuple[str, ...], *, compiles: bool, renew: bool) -> None:
    """Download and build what is carried, cut it into loads, and write the list.

    Args:
        folder: of the loads.
        left_out: names that are not carried.
        compiles: compile here what needs a compiler of CUDA, for compute capability 9.0.
        renew: write the list beside this program anew, too.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True, exist_ok=True)
    wanted = {name: version for name, version in versions().items() if name not in left_out}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    found = [f"{name}=={version}" for name, version in wanted.items() if name not in BUILT]
    run(*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", whole, *found)
    for name, variables in BUILT.items():
        if name not in wanted:
            continue
        words = ["-q", "--no-deps", "--no-build-isolation", f"{name}=={wanted[name]}"]
        if name in COMPILED and not holds(whole, name, ".tar.gz"):
            run(*pip, "download", "--no-binary=:all:", "-d", whole, *words)
        if (name not in COMPILED or compiles) and not holds(whole, name, ".whl"):
            run(*pip, "wheel", "-w", whole, *words, **variables, **for_compilers("90"))
    listed = cut(folder, whole)
    compare_with_list(listed, renew)
    write(folder / "wheels.json", listed)


def run(*command: object, **variables: str) -> None:
    """Run a program; its words are shown."""
    environment = {**os.environ, **variables}
    subprocess.run([str(word) for word in command], check=True, env=environment)


def holds(folder: Path, name: str, ending: str) -> bool:
    """Tell whether a folder has a file of a distribution."""
    return any(plain_name(path.name.split("-")[0]) == name and path.name.endswith(ending)
               for path in folder.iterdir())  # fmt: skip


def for_compilers(architecture: str) -> dict[str, str]:
    """Show compilers the headers that came with torch, and let them build for one kind of GPU.

    Setups that name every kind of GPU take another nvcc where torch is told of one: this program.
    """
    found = importlib.util.find_spec("nvidia")
    homes = [Path(home) for home in found.submodule_search_locations or ()] if found else []
    parts = [part for home in homes for part in sorted(home.iterdir())]
    on_path = Path(shutil.which("nvcc") or "/nvcc").resolve().parent.parent
    told = Path(os.environ.get("CUDA_HOME", on_path))  # torch takes the first nvcc on the path,
    cuda = told if (told / "include" / "crt").is_dir() else Path("/usr/local/cuda")  # or a script
    parts.insert(0, cuda)
    return {
        "CUDA_HOME": str(cuda),
        "CPATH": ":".join(str(part / "include") for part in parts),
        "LIBRARY_PATH": ":".join(str(part / "lib") for part in parts),
        "PYTORCH_NVCC": f"{sys.executable} {Path(__file__).resolve()} nvcc",
        "ONE_ARCHITECTURE": f"sm_{architecture}",
    }


def nvcc(words: list[str]) -> None:
    """Call nvcc without the architectures that were not asked for."""
    kept = [
        word
        for number, word in enumerate(words)
        if not is_other_architecture(words[number : number + 2])
        and not is_other_architecture(words[max(0, number - 1) : number + 1])
    ]
    compiler = f"{os.environ['CUDA_HOME']}/bin/nvcc"
    os.execv(compiler, [compiler, *kept])


def is_other_architecture(pair: list[str]) -> bool:
    """Tell whether two words ask nvcc for another kind of GPU."""
    asked = len(pair) == 2 and pair[0] == "-gencode"
    return asked and not pair[1].endswith(os.environ["ONE_ARCHITECTURE"])


def cut(folder: Path, whole: Path) -> list[dict[str, Any]]:
    """Put files into loads, the large ones in pieces; return what is where."""
    for old in folder.glob("load_*"):
        shutil.rmtree(old)
    listed, load, room = [], 0, 0
    for path in sorted(whole.iterdir(), key=lambda one: (one.stat().st_size, one.name)):
        pieces = []
        for number, block in enumerate(blocks_of(path, LOAD_BYTES)):
            if len(block) > room:
                load, room = load + 1, LOAD_BYTES
                (folder / f"load_{load}").mkdir()
            name = f"load_{load}/{path.name}.{number:02d}"
            (folder / name).write_bytes(block)
            room -= len(block)
            pieces.append({"file": name, "bytes": len(block), "sha256": sha256(block)})
        name, version = path.name.removesuffix(".tar.gz").split("-")[:2]
        listed.append({
            "name": plain_name(name), "version": version, "file": path.name,
            "bytes": path.stat().st_size, "sha256": digest(path), "pieces": pieces,
            "from": "built" if built_here(path.name) else "index",
        })  # fmt: skip
    return listed


def built_here(name: str) -> bool:
    return name.endswith(".whl") and plain_name(name.split("-")[0]) in BUILT


def compare_with_list(listed: list[dict[str, Any]], renew: bool) -> None:
    """Hold what was downloaded against the list of before, or write it anew."""
    if renew:
        write(LIST, listed)
        return
    before = {one["file"]: one["sha256"] for one in json.loads(LIST.read_text())}
    other = [
        one["file"] for one in listed
        if one["from"] == "index" and before.get(one["file"]) != one["sha256"]
    ]  # fmt: skip
    if other:
        sys.exit(f"not the files of {LIST.name}: {', '.join(other)}; --renew takes them")


# join and install --------------------------------------------------------------------------------


def join(folder: Path) -> None:
    """Put pieces together; every hash must be that of the list, and every piece there."""
    (folder / "whole").mkdir(exist_ok=True)
    faults = []
    for one in read(folder):
        target = folder / "whole" / one["file"]
        if target.is_file() and digest(target) == one["sha256"]:
            continue
        missing = [part["file"] for part in one["pieces"] if not (folder / part["file"]).is_file()]
        if missing:
            faults += [f"{name} is missing" for name in missing]
            continue
        blocks = [(folder / part["file"]).read_bytes() for part in one["pieces"]]
        wrong = [
            f"{part['file']} is damaged: another sha256 than in wheels.json"
            for part, block in zip(one["pieces"], blocks, strict=True)
            if sha256(block) != part["sha256"]
        ]
        faults += wrong
        if not wrong:
            target.write_bytes(b"".join(blocks))
    if faults:
        print("\n".join(faults))
        print("carry these loads again; what is whole is used meanwhile")


def install(folder: Path, site: Path) -> None:
    """Install the wheels that this Python lacks, or has in another version than must be."""
    join(folder)
    wheels = []
    for one in read(folder):
        path = folder / "whole" / one["file"]
        if path.suffix == ".whl" and path.is_file() and is_lacking(one["name"], one["version"]):
            wheels.append(path)
    if not wheels:
        return
    # All at once: two of them share the folder transformer_engine.
    run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index",
        "--no-deps", "--no-compile", "--upgrade", "--target", site, *wheels,
    )  # fmt: skip
    (site / EMPTY_MODULE).touch()
    print(f"installed {len(wheels)} wheels into {site}")


def is_lacking(name: str, version: str) -> bool:
    """Tell whether a distribution is not there, or not in the version that it must have."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return name in EXACT and found.partition("+")[0] != version.partition("+")[0]


def compile_source(folder: Path, name: str, site: Path, architecture: str) -> None:
    """Compile a carried source package for one kind of GPU, into the folder of the wheels.

    Transformer Engine looks for its torch part beside itself. Programs that start meanwhile must
    find all of a package or nothing: libraries come first, what makes it known to Python last.
    """
    if not is_lacking(name, versions()[name]):
        return
    (source,) = (path for path in (folder / "whole").glob("*.tar.gz")
                 if plain_name(path.name.split("-")[0]) == name)  # fmt: skip
    partial = site.with_name(f"{name}.partial")
    site.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    run(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index",
        "--no-deps", "--no-build-isolation", "--target", partial, source,
        **BUILT[name], **for_compilers(architecture),
    )  # fmt: skip
    for path in sorted(partial.iterdir(), key=lambda one: (one.is_dir(), one.suffix)):
        if not (site / path.name).exists():  # a folder bin of both
            path.rename(site / path.name)
    shutil.rmtree(partial)


# files -------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, Any]]:
    """The list of what a folder of loads should hold."""
    files: list[dict[str, Any]] = json.loads((folder / "wheels.json").read_text())
    return files


def write(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def blocks_of(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def sha256(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    for block in blocks_of(path, BLOCK_BYTES):
        found.update(block)
    return found.hexdigest()


def main() -> None:
    """Do one of the four."""
    if sys.argv[1:2] == ["nvcc"]:
        nvcc(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("collect", "join", "install", "compile"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "collect":
            command.add_argument("--renew", action="store_true", help="write the list anew")
            command.add_argument("--compile", action="store_true", help="for CUDA, here")
            command.add_argument("--without-cuda", action="store_true", help="for plain twins")
        if name == "compile":
            command.add_argument("name", choices=COMPILED)
        if name in ("install", "compile"):
            command.add_argument("site", type=Path)
        if name == "compile":
            command.add_argument("--architecture", default="90")
    given = parser.parse_args()
    if given.command == "collect":
        left_out = FOR_GPUS if given.without_cuda else ()
        collect(given.folder, left_out, compiles=given.compile, renew=given.renew)
    elif given.command == "join":
        join(given.folder)
    elif given.command == "install":
        install(given.folder, given.site)
    else:
        compile_source(given.folder, given.name, given.site, given.architecture)


if __name__ == "__main__":
    main()
