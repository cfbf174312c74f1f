"""How long a step is blocked by a checkpoint: saved at once, or from a copy while training goes on.

    python tests/benchmarks/async_save.py [--model ladder_60m] [--rounds 5] [--threads 2]

In every round, one after the other so that a busy machine slows all alike: some steps, the bare
copy of weights and optimizer state in host memory, a synchronous save, and an asynchronous one with
the steps that are taken until it is written. Printed are medians of the rounds, as ratios too.
"""

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LENGTH, BATCH, INTERVAL = 256, 2, 50


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ladder_60m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    runtime = Runtime(device=Device.cpu, threads=options.threads)
    with process(runtime, 0), tempfile.TemporaryDirectory() as folder:
        measure(options.model, options.rounds, Path(folder))


def measure(model: str, rounds: int, folder: Path) -> None:
    """Take the rounds; files go to `folder`."""
    from hybrid_train.checkpoint import save_load, store
    from hybrid_train.checkpoint.writing import KeptSavePlan
    from hybrid_train.training.hooks.checkpointing import content_of

    engine, step = engine_of(model)
    content, plan = content_of(engine), KeptSavePlan()
    for _ in range(2):
        step()
    gc.collect()  # as a run does (training/hooks/processes.py)
    gc.freeze()
    gc.disable()
    seconds: dict[str, list[float]] = defaultdict(list)
    size = 0
    for number in range(rounds + 1):  # the first finds memory and files untouched, and is left out
        taken = {"step": min(timed(step) for _ in range(3))}
        tensors = plan.tensors(content)
        taken["copy"] = timed(partial(save_load.on_host, tensors, copy=True))
        size = sum(tensor.data.nbytes for tensor in tensors)
        taken["sync"] = timed(partial(store.save, folder, content, position(2 * number), keep=1))
        taken |= asynchronous(folder, content, position(2 * number + 1), plan, step)
        if number:
            for name, value in taken.items():
                seconds[name].append(value)
    report({name: statistics.median(values) for name, values in seconds.items()}, size, folder)


def position(step: int) -> dict[str, int]:
    """Return the position of a run, as far as a checkpoint has to have one."""
    return {"step": step}


def asynchronous(
    folder: Path, content: Any, where: dict[str, int], plan: Any, step: Callable[[], None]
) -> dict[str, float]:
    """Save while steps are taken; return how long each part took."""
    from hybrid_train.checkpoint import store

    begin = time.perf_counter()
    saving = store.start(folder, content, where, keep=1, copy=True, plan=plan)
    started = time.perf_counter()
    steps, ends = [], 0.0
    done = False
    while not done:
        steps.append(timed(step))
        asked = time.perf_counter()
        done = saving.is_done()
        if done:
            saving.finish()
        ends += time.perf_counter() - asked
    return {
        "async start": started - begin,
        "async finish": ends,
        "async": started - begin + ends,
        "step beside": statistics.mean(steps),
        "steps beside": len(steps),
    }


def engine_of(model: str) -> tuple[Any, Callable[[], None]]:
    """Build the engine of a named model; return it with a step on fixed tokens."""
    import torch
    from fixed_batch import fixed_batch

    from hybrid_train.anatomy.counts import parameters
    from hybrid_train.config import compose
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model

    words = ["experiment=tiny_cpu", "run_dir=/nonexistent", f"model={model}", "precision=fp32"]
    words += [f"train.sequence_length={LENGTH}", f"train.global_batch={BATCH}"]
    words += [f"train.microbatch={BATCH}", "model.vocab_size=4096"]
    job = compose.compose("train", words)
    groups = build_groups(job.parallel, 600)
    built = build_model(job, groups, 4096, on_gpu=False)
    print(f"{model}: {parameters(job.model, 4096).total / 1e6:.1f}M parameters with 4096 rows")
    engine = build_engine(job, built, groups, torch.device("cpu"))
    batch = fixed_batch(4096, BATCH, LENGTH)
    return engine, lambda: engine.step(iter([batch]), tokens_seen=10**6)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def report(median: dict[str, float], size: int, folder: Path) -> None:
    """Print seconds and ratios."""
    step = median["step"]
    print(f"{size / 1e6:.0f} MB of state; {shutil.disk_usage(folder).free / 1e9:.0f} GB free")
    print(f"{'':38}{'s':>8}{'steps':>8}{'copies':>8}  share at an interval of {INTERVAL} steps")
    for title, name in (
        ("a step", "step"),
        ("bare copy to host memory", "copy"),
        ("blocked by a synchronous save", "sync"),
        ("blocked by an asynchronous save", "async"),
        ("  of that, to begin", "async start"),
        ("  of that, at the ends of later steps", "async finish"),
    ):
        value = median[name]
        share = "" if name == "step" else f"{value / (INTERVAL * step):8.2%}"
        print(f"{title:38}{value:8.3f}{value / step:8.2f}{value / median['copy']:8.2f}  {share}")
    print(
        f"a step beside the writer takes {median['step beside'] / step:.2f} times as long; "
        f"{median['steps beside']:.0f} steps are taken until it is written"
    )


if __name__ == "__main__":
    main()
