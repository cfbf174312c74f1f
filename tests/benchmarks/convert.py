"""Times conversions of the 1B ladder model both ways, beside a plain copy of the same files.

python tests/benchmarks/convert.py [--rounds 5] [--folder DIR]

Each round copies the Hugging Face folder and imports it, then copies the checkpoint and exports it;
every conversion runs in a process of its own, whose memory at the peak is compared with that when
all modules are loaded. What was written before is flushed to the disk before each measurement.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOCAB = 4096


def main() -> int:
    """Make the folder, run the rounds, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files go; a temporary folder otherwise")
    parser.add_argument("--timed", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        return convert(*arguments.timed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_rounds(Path(folder), arguments.rounds)
    return 0


def run_rounds(folder: Path, rounds: int) -> None:
    source = folder / "source"
    made = make_source(source)
    print(f"ladder_1b, vocabulary {VOCAB}, bfloat16: {made / 1e9:.3f} GB of tensors")
    shares: dict[str, list[float]] = {"import": [], "export": []}
    for _ in range(rounds):
        for way, origin in (("import", source), ("export", folder / "import")):
            copied = timed_copy(origin, folder / "copy")
            found = timed_conversion(way, origin, folder / way)
            shutil.rmtree(folder / "copy")
            shares[way].append(copied / found["seconds"])
            print(
                f"{way}: {made / found['seconds'] / 1e9:.2f} GB/s, copy {made / copied / 1e9:.2f} "
                f"GB/s, share {shares[way][-1]:.2f}; peak {found['peak'] / 1e6:.0f} MB above the "
                f"start, {found['peak'] / made:.1%} of the model"
            )
        for way in shares:
            shutil.rmtree(folder / way)
    for way, found in shares.items():
        print(f"{way}: median share of a plain copy {statistics.median(found):.2f}")


def make_source(source: Path) -> int:
    """Write random weights under the released names in two files; return their size."""
    import torch

    from hybrid_train.config.compose import compose
    from hybrid_train.hf import config as hf_config
    from hybrid_train.hf.files import write_json
    from hybrid_train.hf.names import table
    from hybrid_train.hf.read import INDEX
    from hybrid_train.hf.safetensors import Writer
    from hybrid_train.hf.tensors import turned

    model = compose("count", ["model=ladder_1b", f"model.vocab_size={VOCAB}"]).model
    source.mkdir()
    tensors = list(turned(table(model, VOCAB)).values())
    half = len(tensors) // 2
    pool = torch.randn(2**23)  # more than any tensor has; drawing them all would take minutes
    weight_map, total = {}, 0
    for number, part in enumerate((tensors[:half], tensors[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        formats = {
            one.name: (torch.float32 if one.keeps_float32 else torch.bfloat16, one.shape)
            for one in part
        }
        writer = Writer(source / file, formats)
        for name, (dtype, shape) in formats.items():
            writer.add(pool[: math.prod(shape)].view(shape).to(dtype))
            weight_map[name] = file
        writer.close()
        total += (source / file).stat().st_size
    write_json(source / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    said = hf_config.to_config(
        model, vocab_size=VOCAB, length=8192, dtype="bfloat16", end_of_document=None
    )
    write_json(source / hf_config.FILE, said)
    return total


def timed_copy(source: Path, target: Path) -> float:
    """Copy a folder with the system's own call, and return the seconds."""
    os.sync()
    start = time.perf_counter()
    shutil.copytree(source, target)
    return time.perf_counter() - start


def timed_conversion(way: str, source: Path, target: Path) -> dict[str, float]:
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--timed", way, str(source), str(target)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def convert(way: str, source: str, target: str) -> int:
    """Convert in this process; print the seconds and how far memory rose."""
    from hybrid_train.config.compose import compose
    from hybrid_train.jobs import convert as job

    asked = compose("convert", [f"{way}={source}", f"output={target}"])
    before = memory("VmRSS")
    start = time.perf_counter()
    job.run(asked)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM") - before}))
    return 0


def memory(kind: str) -> int:
    """Read this process's memory in bytes: VmRSS is that of now, VmHWM the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(kind)


if __name__ == "__main__":
    sys.exit(main())
