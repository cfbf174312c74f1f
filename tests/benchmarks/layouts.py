"""What a layout costs on this machine: a training step on two processes against one.

    python tests/benchmarks/layouts.py [--rounds 8] [--layouts TP2 PP2 ...]

The same model of the ladder (10M parameters, float32), the same global batch. One process has two
threads, each of two has one. All stay alive and take turns, one step each, in an order that
changes with every round, so that a busy machine slows all alike. Printed is the time of a step as
a multiple of that of one process: the median of the rounds, and of the best steps. At 1.0 a layout
costs nothing: the work is split, and two threads have as much of the machine as two processes.

The losses of the first step are compared too; a layout that computes something else is no news.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH, LENGTH, CORES = 8, 128, 2  # sequences of a step, tokens of each, threads in all
OVERRIDES = [
    "experiment=tiny_cpu", "model=ladder_10m", "run_dir=/nonexistent", "precision=fp32",
    "model.vocab_size=4096", f"train.sequence_length={LENGTH}", "train.microbatch=1",
    f"train.global_batch={BATCH}",
]  # fmt: skip
LAYOUTS = {
    "one process": (),
    "TP2": ("parallel.tensor=2",),
    "PP2": ("parallel.pipeline=2",),
    "EP2": ("parallel.expert=2",),
    "DP2": (),
    "CP2": ("parallel.context=2",),
}


@dataclass(frozen=True)
class Layout:
    """The processes of one layout, which step when told to."""

    processes: list[subprocess.Popen[str]]

    def ask(self, question: str) -> Any:
        """Send one line to every process, and return the answer of the first."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(question + "\n")
            process.stdin.flush()
        answers = [_answer(process) for process in self.processes]
        return answers[0]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("{"):
        if not line:
            raise RuntimeError("a process died; its words stand above")
    return json.loads(line)["answer"]


def start(name: str) -> Layout:
    """Start the processes of a layout, with the variables that torchrun would set."""
    number = 1 if name == "one process" else CORES
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
        "OMP_NUM_THREADS": str(CORES // number),
    }  # fmt: skip
    return Layout(
        [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", name],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for rank in range(number)
        ]
    )  # fmt: skip


def compare(names: list[str], rounds: int) -> None:
    """Let all layouts take turns, and print what came out."""
    layouts = {name: start(name) for name in ["one process", *names]}
    try:
        firsts = {name: layout.ask("loss") for name, layout in layouts.items()}
        seconds: dict[str, list[float]] = defaultdict(list)
        order = list(layouts)
        for _ in range(rounds):
            for name in order:
                seconds[name].append(layouts[name].ask("step"))
            order = order[1:] + order[:1]
        parameters = layouts["one process"].ask("parameters")
    finally:
        for layout in layouts.values():
            layout.end()
    show(firsts, seconds, parameters)


def show(firsts: dict[str, float], seconds: dict[str, list[float]], parameters: int) -> None:
    """Print the table."""
    alone = seconds["one process"]
    print(f"{parameters:,} parameters, {BATCH} x {LENGTH} tokens a step, {len(alone)} rounds")
    print(f"{'layout':12} {'median':>8} {'best':>8}  {'best step':>10}  {'loss of step 1':>14}")
    for name, times in seconds.items():
        pairs = [own / other for own, other in zip(times, alone, strict=True)]
        print(
            f"{name:12} {statistics.median(pairs):8.2f} {min(times) / min(alone):8.2f}  "
            f"{min(times):8.3f} s  {firsts[name]:14.6f}"
        )


def serve(name: str) -> None:
    """Build the engine of a layout, take two steps, and answer until the other side is gone."""
    from hybrid_train.config import compose, launcher
    from hybrid_train.runtime.start import process

    job = compose.compose("train", [*OVERRIDES, *LAYOUTS[name]])
    job.runtime.threads = CORES // launcher.world_size()
    with process(job.runtime, job.train.seed):
        step, parameters = step_of(job)
        first = step()
        step()
        answers = {"loss": lambda: first, "step": lambda: timed(step), "parameters": parameters}
        for line in sys.stdin:
            print(json.dumps({"answer": answers[line.strip()]()}), flush=True)


def step_of(job: Any) -> tuple[Any, Any]:
    """Return what takes a step on fixed tokens, and what counts the parameters of the model."""
    import torch

    from hybrid_train.anatomy.counts import parameters
    from hybrid_train.data.batch import Batch
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model

    groups = build_groups(job.parallel, 600)
    vocab_size = job.model.vocab_size
    built = build_model(job, groups, vocab_size, on_gpu=False)
    engine = build_engine(job, built, groups, torch.device("cpu"))
    data_rank, data_size = groups.dp.rank(), groups.dp.size()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (BATCH, LENGTH + 1), generator=generator)
    own = rows[data_rank::data_size].split(job.train.microbatch)
    positions = torch.arange(LENGTH)[None]
    batches = [
        Batch(row[:, :-1], row[:, 1:], torch.ones(1, LENGTH), positions) for row in own
    ]  # as the loader gives them; the engine takes the piece of a context rank
    size = parameters(job.model, vocab_size).total
    return lambda: engine.step(iter(batches), tokens_seen=10**6).loss, lambda: size


def timed(step: Any) -> float:
    """Return the seconds of one step."""
    start_time = time.perf_counter()
    step()
    return time.perf_counter() - start_time


def main() -> None:
    """Compare, or serve as one process of a layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--layouts", nargs="+", choices=list(LAYOUTS)[1:], default=list(LAYOUTS)[1:]
    )
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker)
    else:
        compare(options.layouts, options.rounds)


if __name__ == "__main__":
    main()
