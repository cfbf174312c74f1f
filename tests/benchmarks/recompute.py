"""What recomputing activations saves and costs: bytes kept by a forward pass, time of a step.

    python tests/benchmarks/recompute.py [--model ladder_10m] [--rounds 5] [--threads 2]

Engines of one model, each with another plan, take turns, one step each, so that a busy machine
slows all alike. Printed are the bytes that a forward pass keeps for the backward pass, weights
aside, and the time of a step as a multiple of that without recomputation: the median of the rounds.
"""

import argparse
import statistics
import time
from typing import Any

LENGTH, BATCH, VOCAB = 256, 4, 4096
PLANS = {
    "none": (),
    "selective: mamba, moe": ("parallel.recompute=selective",),
    "selective: mamba": ("parallel.recompute=selective", "parallel.recompute_modules=[mamba]"),
    "selective: moe": ("parallel.recompute=selective", "parallel.recompute_modules=[moe]"),
    "selective: mlp": ("parallel.recompute=selective", "parallel.recompute_modules=[mlp]"),
    "full": ("parallel.recompute=full",),
    "full, two layers": (
        "parallel.recompute=full",
        "parallel.recompute_method=block",
        "parallel.recompute_layers=2",
    ),
}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ladder_10m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    with process(Runtime(device=Device.cpu, threads=options.threads), 0):
        compare(options.model, options.rounds)


def compare(model: str, rounds: int) -> None:
    """Let the plans take turns."""
    from hybrid_train.megatron.data_parallel import build_groups

    jobs = {name: job_of(model, words) for name, words in PLANS.items()}
    groups = build_groups(jobs["none"].parallel, 600)
    engines = {name: engine_of(job, groups) for name, job in jobs.items()}
    kept = {name: kept_bytes(engine) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step(batches(), tokens_seen=10**6)
            seconds[name].append(time.perf_counter() - start)
    print(f"{model}, {BATCH} x {LENGTH} tokens, float32, {rounds} rounds")
    print(f"{'recompute':24} {'bytes kept':>12} {'share':>7} {'step time':>10}")
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds["none"], strict=True)]
        share = kept[name] / kept["none"]
        print(f"{name:24} {kept[name]:12,} {share:7.1%} {statistics.median(ratios):9.2f}x")


def job_of(model: str, words: tuple[str, ...]) -> Any:
    """Compose the job of a plan."""
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

    engine = build_engine(
        job, build_model(job, groups, VOCAB, on_gpu=False), groups, torch.device("cpu")
    )
    engine.step(batches(), tokens_seen=10**6)
    return engine


def batches() -> Any:
    """Return one microbatch of fixed tokens."""
    from fixed_batch import fixed_batch

    return iter([fixed_batch(VOCAB, BATCH, LENGTH)])


def kept_bytes(engine: Any) -> int:
    """Return the bytes of the tensors that one forward pass keeps, weights aside."""
    from torch.autograd.graph import saved_tensors_hooks

    (model,) = engine.network.chunks
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}  # storages stay alive here: no address comes twice

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = next(batches())
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.objective.forward(model, batch, engine.objective.count([batch]))
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
