"""Times parts that are written by hand beside what a library would do in their place.

python tests/benchmarks/by_library.py workers [--rounds 5]
python tests/benchmarks/by_library.py blocks [--rounds 5]
python tests/benchmarks/by_library.py tensors [--rounds 5]
python tests/benchmarks/by_library.py items [--rounds 5]

workers: `data.prepare.worker_pool` against concurrent.futures, in commands of `data tokenize`.
blocks: `data.prepare.journal`, which appends, against a file for each block and a merge.
tensors: `hf.safetensors` against the library of that name: reading rows, and writing a file.
items: `checkpoint.tensor_files`, reading rows, against torch.load(weights_only=True).
Each way runs in a process of its own, in turn; medians of seconds, of processor time (children
included) and of the memory above the start. The outputs of both ways are compared, to the byte.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = ("hybrid_train.data.prepare.tokenization", "hybrid_train.hf.safetensors")  # not counted
WORKERS = 2
BLOCKS, BLOCK_BYTES = 1000, 2**19  # ids of a block of `data tokenize`: a megabyte of text
TENSORS, SHAPE, ROWS = 24, (8192, 1024), 512  # 0.4 GB in bfloat16; rows that are read at a time


def main() -> int:
    """Run one comparison, or one way of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=tuple(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="of the text that is tokenized")
    parser.add_argument("--timed", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.timed:
        way, folder = arguments.timed
        print(json.dumps(measured(WAYS[arguments.what][way], Path(folder))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        compare(arguments.what, Path(name), arguments.rounds, arguments.copies)
    return 0


def compare(what: str, folder: Path, rounds: int, copies: int) -> None:
    """Run all ways in turn, compare what they wrote, print medians and ratios."""
    if what == "workers":
        from tests.benchmarks.tokenize_text import make

        make(folder, copies, vocab=8192)
    if what == "tensors":
        make_tensors(folder)
    if what == "items":
        make_items(folder)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[what]}
    for turn in range(rounds):
        ways = list(WAYS[what])
        for way in ways if turn % 2 else reversed(ways):
            found[way].append(timed(what, way, folder))
            print(way, {name: round(value, 3) for name, value in found[way][-1].items()})
        require_equal(folder)
    for way, runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"median of {way}: " + ", ".join(f"{k} {v:.3f}" for k, v in middle.items()))
    for first, second in PAIRS[what]:
        for name in ("seconds", "processor"):
            pairs = zip(found[first], found[second], strict=True)
            ratios = sorted(two[name] / one[name] for one, two in pairs)
            middle_ratio = statistics.median(ratios)
            spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            print(f"{name}, {second} / {first}: {middle_ratio:.3f} ({spread})")


def timed(what: str, way: str, folder: Path) -> dict[str, float]:
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, what, "--timed", way, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(work: Callable[[Path], float | None], folder: Path) -> dict[str, float]:
    """Do one way; it may say the bytes that it had on the disk at most."""
    for module in IMPORTED:
        importlib.import_module(module)
    before, used, start = memory("VmRSS"), processor_time(), time.perf_counter()
    disk = work(folder)
    return {
        "seconds": time.perf_counter() - start,
        "processor": processor_time() - used,
        "memory_mb": (memory("VmHWM") - before) / 1e6,
        **({} if disk is None else {"disk_mb": disk / 1e6}),
    }


def processor_time() -> float:
    """Return the seconds of user and system, of children that have ended too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory(kind: str) -> int:
    """Read this process's memory in bytes: VmRSS is that of now, VmHWM the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(kind)


def require_equal(folder: Path) -> None:
    """Compare the outputs of all ways, which are called OUTPUT.WAY, and remove them."""
    outputs: dict[str, Path] = {}
    for path in sorted(folder.glob("out.*")):
        stem = path.name.split(".")[1] + path.suffix
        kind = stem.partition(".")[2]
        first = outputs.setdefault(kind, path)
        if kind == "bin" and first.read_bytes() != path.read_bytes():
            sys.exit(f"{first.name} and {path.name} differ")
    for path in folder.glob("out.*"):
        path.unlink()


# workers ----------------------------------------------------------------------------------------


def by_crew(folder: Path) -> None:
    tokenize(folder, "crew")


def by_futures(folder: Path) -> None:
    from hybrid_train.data.prepare import tokenization

    tokenization.WorkerPool = Futures
    tokenize(folder, "futures")


def tokenize(folder: Path, name: str) -> None:
    from hybrid_train.data.prepare.tokenization import tokenize
    from hybrid_train.schema.prepare import TokenizeJob

    job = TokenizeJob(
        input=[str(folder / "corpus.jsonl")], output=str(folder / f"out.{name}"),
        tokenizer=str(folder / "tokenizer"), overwrite=True,
    )  # fmt: skip
    tokenize(job, WORKERS, lambda _: None)


class Futures:
    """What `worker_pool.WorkerPool` does, with concurrent.futures."""

    def __init__(self, prepare: Callable[[Any], Any], facts: object, workers: int) -> None:
        self._workers = workers
        self._pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=begin, initargs=(prepare, facts)
        )

    def __enter__(self) -> "Futures":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        from hybrid_train.data.prepare.worker_pool import _ENVIRONMENT, _KEPT
        from hybrid_train.schema.problems import UserError

        os.environ.update(_ENVIRONMENT)
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._pool.submit(do, task)))
                if len(waiting) >= _KEPT * self._workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker was ended; take fewer workers") from error


WORK: list[Callable[[Any], Any]] = []  # of a worker: what it applies


def begin(prepare: Callable[[Any], Any], facts: object) -> None:
    WORK.append(prepare(facts))
    # A worker of the library's waits for ever when the main process is killed.
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def do(task: Any) -> Any:
    return WORK[0](task)


# blocks -----------------------------------------------------------------------------------------


def parts() -> Iterator[Any]:
    from hybrid_train.data.prepare.journal import Part
    from hybrid_train.data.prepare.manifest import Counts

    lengths = b"\x40\x00\x00\x00" * 256
    for number in range(BLOCKS):
        ids = number.to_bytes(2, "little") * (BLOCK_BYTES // 2)
        yield Part(ids, lengths, [], 256, Counts(documents=256, tokens=len(ids) // 2, lines=256))


def by_journal(folder: Path) -> float:
    """Append all blocks as `data tokenize` does; return the bytes on the disk."""
    from hybrid_train.data.prepare.journal import Journal
    from hybrid_train.data.prepare.manifest import Output

    output = Output(folder / "out.journal")
    with (
        output.locked(),
        Journal(output, {}, 1, overwrite=False, interval_s=5.0) as journal,
    ):
        for number, part in enumerate(parts()):
            journal.append(0, number, part)
        journal.complete()
        size = sum(path.stat().st_size for path in output.folder.iterdir())
    output.path(".bin").rename(folder / "out.journal.bin")
    output.discard()
    return size


def by_files(folder: Path) -> float:
    """Write a file for each block, whole or not at all, and merge them; return as above."""
    import hashlib

    blocks = folder / "files.partial"
    blocks.mkdir()
    digest = hashlib.sha256()
    unsynced: list[Path] = []
    saved = time.monotonic()
    for number, part in enumerate(parts()):
        half, whole = blocks / f"{number}.half", blocks / f"{number:09d}"
        half.write_bytes(part.ids + part.lengths)
        half.rename(whole)
        unsynced.append(whole)
        if time.monotonic() - saved >= 5.0 or number == BLOCKS - 1:
            for path in unsynced:  # a power cut may otherwise leave names without content
                sync(path)
            unsynced, saved = [], time.monotonic()
    target = folder / "out.files.bin"
    with target.open("wb") as file:
        for path in sorted(blocks.iterdir()):
            ids = path.read_bytes()[:BLOCK_BYTES]
            digest.update(ids)
            file.write(ids)
    sync(target)
    size = sum(path.stat().st_size for path in (*blocks.iterdir(), target))
    shutil.rmtree(blocks)
    return size


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# tensors ----------------------------------------------------------------------------------------


def make_tensors(folder: Path) -> None:
    """Write the file of random tensors that is read."""
    import torch

    from hybrid_train.hf.safetensors import Writer

    formats = {f"t{number}": (torch.bfloat16, SHAPE) for number in range(TENSORS)}
    writer = Writer(folder / "made.safetensors", formats)
    for _ in formats:
        values = torch.randn(SHAPE).bfloat16()
        writer.place(values.nbytes).write(values)
    writer.close()


def read_ours(folder: Path) -> None:
    from hybrid_train.checkpoint.tensor_files import OpenFiles
    from hybrid_train.hf.safetensors import read_header

    files = OpenFiles()
    for entry in read_header(folder / "made.safetensors").values():
        for start in range(0, SHAPE[0], ROWS):
            entry.read(files, start, start + ROWS)
    files.close()


def read_library(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "made.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dictionary
            rows = file.get_slice(name)
            for start in range(0, SHAPE[0], ROWS):
                rows[start : start + ROWS].clone()  # as a move does: values that are its own


def write_ours(folder: Path) -> None:
    import torch

    from hybrid_train.hf.safetensors import Writer

    writer = Writer(
        folder / "out.ours.bin", {f"t{n:02d}": (torch.bfloat16, SHAPE) for n in range(TENSORS)}
    )
    for number in range(TENSORS):
        for start in range(0, SHAPE[0], ROWS):
            values = torch.full((ROWS, SHAPE[1]), number + start, dtype=torch.bfloat16)
            writer.place(values.nbytes).write(values)
    writer.close()


def write_library(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for number in range(TENSORS):
        whole = torch.empty(SHAPE, dtype=torch.bfloat16)
        for start in range(0, SHAPE[0], ROWS):
            whole[start : start + ROWS] = number + start
        tensors[f"t{number:02d}"] = whole
    save_file(tensors, folder / "out.library.bin", metadata={"format": "pt"})


# items ------------------------------------------------------------------------------------------


def make_items(folder: Path) -> None:
    """Write a checkpoint of random tensors, each one item, as an import does."""
    import torch

    from hybrid_train.checkpoint.tensor_files import CheckpointWriter

    writer = CheckpointWriter(folder)
    for number in range(TENSORS):
        place = writer.place(f"t{number:02d}", SHAPE, 0, SHAPE, torch.bfloat16)
        place.write(torch.randn(SHAPE).bfloat16())
    writer.finish()


def items_ours(folder: Path) -> None:
    from hybrid_train.checkpoint.tensor_files import StoredTensors

    with StoredTensors(folder) as stored:
        written(folder / "out.ours.bin", (
            stored.read(name, start, start + ROWS)
            for name in sorted(stored.names) for start in range(0, SHAPE[0], ROWS)
        ))  # fmt: skip


def items_library(folder: Path) -> None:
    """Load an item as torch's own reader does, but without running a pickle, and take its rows."""
    import io

    import torch

    from hybrid_train.checkpoint import safe_metadata

    places = safe_metadata.read(folder).storage_data
    items = sorted((key.fqn, place) for key, place in places.items() if key.offset is not None)

    def rows() -> Iterator[Any]:
        for _, place in items:
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                whole = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
            yield from (whole[start : start + ROWS] for start in range(0, SHAPE[0], ROWS))

    written(folder / "out.library.bin", rows())


def written(path: Path, rows: Iterable[Any]) -> None:
    """Write bytes that show that both read the same: the first row of each part."""
    import torch

    with path.open("wb") as file:
        for part in rows:
            file.write(part[0].contiguous().view(torch.uint8).numpy().tobytes())


WAYS: dict[str, dict[str, Callable[[Path], float | None]]] = {
    "workers": {"crew": by_crew, "futures": by_futures},
    "blocks": {"journal": by_journal, "files": by_files},
    "tensors": {
        "read_ours": read_ours, "read_library": read_library,
        "write_ours": write_ours, "write_library": write_library,
    },
    "items": {"items_ours": items_ours, "items_library": items_library},
}  # fmt: skip
PAIRS = {
    "workers": [("crew", "futures")],
    "blocks": [("journal", "files")],
    "items": [("items_ours", "items_library")],
    "tensors": [("read_ours", "read_library"), ("write_ours", "write_library")],
}


if __name__ == "__main__":
    sys.exit(main())
