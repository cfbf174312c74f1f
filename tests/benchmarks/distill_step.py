"""What a teacher costs: the step of a student against the same step without one.

    python tests/benchmarks/distill_step.py [--model ladder_10m] [--rounds 9] [--threads 2]

The teacher has the size of the student. Engines take turns, one step each, so that a busy machine
slows all alike; printed is the time of a step as a multiple of next-token prediction, the median of
the rounds, and the lowest and highest. A forward pass is a third of a step: 1.33 is what can be
hoped for.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, VOCAB = 256, 4, 4096
TAUGHT = {
    "forward KL": (),
    "mixed, temperature 2": ("objective.reverse_share=0.5", "objective.temperature=2"),
    "half cross-entropy": ("objective.cross_entropy_share=0.5",),
    "64 tokens and a rest": ("objective.top_k=64",),
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ladder_10m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--names", nargs="*", default=list(TAUGHT))
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    runtime = Runtime(device=Device.cpu, threads=options.threads)
    with process(runtime, 0), tempfile.TemporaryDirectory() as folder:
        compare(options.model, options.rounds, Path(folder) / "teacher", options.names)


def compare(model: str, rounds: int, teacher: Path, names: list[str]) -> None:
    """Let the objectives take turns."""
    from hybrid_train.megatron.data_parallel import build_groups

    plain = job_of(model, "train.seed=7")
    groups = build_groups(plain.parallel, 600)
    engines = {"next token": engine_of(plain, groups)}
    write(engines["next token"], plain, teacher)
    given = ("objective=distill", f"objective.teacher={teacher}")
    for name in names:
        engines[name] = engine_of(job_of(model, *given, *TAUGHT[name]), groups)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step(batches(), tokens_seen=10**6)
            seconds[name].append(time.perf_counter() - start)
    print(f"{model}, {BATCH} x {LENGTH} tokens, vocabulary {VOCAB}, float32, {rounds} rounds")
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds["next token"], strict=True)]
        print(
            f"{name:24} {statistics.median(times):7.3f} s {statistics.median(ratios):6.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def job_of(model: str, *words: str) -> Any:
    """Compose a job."""
    from hybrid_train.config import compose

    sizes = [f"train.sequence_length={LENGTH}", f"train.global_batch={BATCH}"]
    sizes += [f"train.microbatch={BATCH}", f"model.vocab_size={VOCAB}"]
    base = ["experiment=tiny_cpu", f"model={model}", "run_dir=/nonexistent", "precision=fp32"]
    return compose.compose("train", [*base, *sizes, *words])


def engine_of(job: Any, groups: Any) -> Any:
    """Build the engine of a job; its first step is taken here."""
    import torch

    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    built = build_model(job, groups, VOCAB, on_gpu=False)
    engine = build_engine(job, built, groups, torch.device("cpu"))
    engine.step(batches(), tokens_seen=10**6)
    return engine


def write(engine: Any, job: Any, run_dir: Path) -> None:
    """Write a run with the weights of an engine."""
    from hybrid_train.checkpoint import store
    from hybrid_train.config import frozen
    from hybrid_train.training.hooks.checkpointing import content_of

    frozen.freeze(job, run_dir)
    store.save(run_dir, content_of(engine), {"step": 1, "tokens": 0}, keep=1)


def batches() -> Any:
    """Return one microbatch of fixed tokens."""
    from fixed_batch import fixed_batch

    return iter([fixed_batch(VOCAB, BATCH, LENGTH)])


if __name__ == "__main__":
    main()
