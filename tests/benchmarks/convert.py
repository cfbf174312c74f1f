"""Times conversions of the 1B ladder model, each beside a plain copy of the same files.

python tests/benchmarks/convert.py [--rounds 5] [--folder DIR]

Each round copies the Hugging Face folder and imports it, then copies the checkpoint and exports it,
to Hugging Face and to Megatron-LM, whose folder it copies and imports.
Copies and conversions run in processes of their own, measured from when all modules are loaded:
seconds, processor time (user and system, of all threads), and how far memory rises. What was
written before is flushed to the disk, and as many bytes are written and removed right before: a
virtual machine gives back memory that is free for a second, and to fetch it again takes longer than
a copy, whoever needs it first.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOCAB = 4096
WAYS = {  # from where, and how
    "import": ("source", "import={}"),
    "export": ("import", "export={}"),
    "export_megatron_lm": ("import", "export={} format=megatron_lm"),
    "import_megatron_lm": ("export_megatron_lm", "import={}"),
}


def main() -> int:
    """Make the folder, run the rounds, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files go; a temporary folder otherwise")
    parser.add_argument("--timed", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        return measure(*arguments.timed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_rounds(Path(folder), arguments.rounds)
    return 0


def run_rounds(folder: Path, rounds: int) -> None:
    """Print each round, and the medians of all."""
    source = folder / "source"
    made = make_source(source)
    print(f"ladder_1b, vocabulary {VOCAB}, bfloat16: {made / 1e9:.3f} GB of tensors")
    shares: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (name, _) in WAYS.items():
            origin = folder / name
            copy = timed("copy", origin, folder / "copy")
            found = timed(way, origin, folder / way)
            shutil.rmtree(folder / "copy")
            shares[way].append(
                (copy["seconds"] / found["seconds"], copy["processor"] / found["processor"])
            )
            print(
                f"{way}: {made / found['seconds'] / 1e9:.2f} GB/s, copy "
                f"{made / copy['seconds'] / 1e9:.2f} GB/s, share {shares[way][-1][0]:.2f}; "
                f"processor {found['processor']:.2f} s, copy {copy['processor']:.2f} s, share "
                f"{shares[way][-1][1]:.2f}; peak {found['peak'] / 1e6:.0f} MB above the start, "
                f"{found['peak'] / made:.1%} of the model",
                flush=True,
            )
        for way in shares:
            shutil.rmtree(folder / way)
    for way, pairs in shares.items():
        time_, processor = (statistics.median(kind) for kind in zip(*pairs, strict=True))
        print(
            f"{way}: median share of a plain copy {time_:.2f} by time, {processor:.2f} by processor"
        )


def make_source(source: Path) -> int:
    """Write random weights under the released names in two files; return their size."""
    import torch

    from hybrid_train.config.compose import compose
    from hybrid_train.hf import config_json
    from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
    from hybrid_train.hf.files import write_json
    from hybrid_train.hf.read import INDEX
    from hybrid_train.hf.safetensors import Writer
    from hybrid_train.hf.tensors import turn_round

    model = compose("count", ["model=ladder_1b", f"model.vocab_size={VOCAB}"]).model
    source.mkdir()
    tensors = list(turn_round(NEMOTRON_H.table(model, VOCAB)).values())
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
            values = pool[: math.prod(shape)].view(shape).to(dtype)
            writer.place(values.nbytes).write(values)
            weight_map[name] = file
        writer.close()
        total += (source / file).stat().st_size
    write_json(source / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    said = config_json.to_config(
        model, vocab_size=VOCAB, length=8192, dtype="bfloat16", token_ids={}
    )
    write_json(source / config_json.FILE, said)
    return total


def timed(way: str, source: Path, target: Path) -> dict[str, float]:
    """Copy or convert in a new process."""
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--timed", way, str(source), str(target)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, source: str, target: str) -> int:
    """Copy or convert in this process; print what it took."""
    from hybrid_train.config.compose import compose
    from hybrid_train.jobs import convert as job

    if way == "copy":
        work = partial(shutil.copytree, source, target)
    else:
        words = [word.format(source) for word in WAYS[way][1].split()]
        work = partial(job.run_convert, compose("convert", [*words, f"output={target}"]))
    fetch_memory(Path(source), Path(target).with_name("fetched"))
    before, processor, start = memory("VmRSS"), processor_time(), time.perf_counter()
    work()
    seconds, processor = time.perf_counter() - start, processor_time() - processor
    peak = memory("VmHWM") - before
    print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak}))
    return 0


def fetch_memory(source: Path, scratch: Path) -> None:
    """Write as much as is in a folder, and remove it."""
    piece = bytes(2**18)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(sum(one.stat().st_size for one in source.rglob("*")) // len(piece)):
            file.write(piece)
    scratch.unlink()


def processor_time() -> float:
    """Return the seconds of user and system that all threads of this process took."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory(kind: str) -> int:
    """Read this process's memory in bytes: VmRSS is that of now, VmHWM the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(kind)


if __name__ == "__main__":
    sys.exit(main())
