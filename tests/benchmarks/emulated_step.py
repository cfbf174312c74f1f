"""What emulated recipes cost on this machine: the time of a step against bfloat16 and float32.

    python tests/benchmarks/emulated_step.py [--model ladder_60m] [--rounds 5] [--threads 2]

Engines of one model, one for each recipe, take turns, one step each, so that a busy machine slows
all alike. Printed are medians of the rounds, as multiples of the step in bfloat16 and in float32.
"""

import argparse
import statistics
import time
from typing import Any

LENGTH, BATCH, VOCAB = 512, 2, 4096
IN_FP8 = "+weights"  # behind a recipe: its weights are kept and gathered in FP8
RECIPES = (
    "bf16", "fp32", "fp8_tensorwise", f"fp8_tensorwise{IN_FP8}", "fp8_blockwise",
    f"fp8_blockwise{IN_FP8}", "mxfp8", "nvfp4", "mxfp4",
)  # fmt: skip


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ladder_60m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    with process(Runtime(device=Device.cpu, threads=options.threads), 0):
        compare(options.model, options.recipes, options.rounds)


def compare(model: str, recipes: list[str], rounds: int) -> None:
    """Let the recipes take turns."""
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.schema.parallel import Parallel

    groups = build_groups(Parallel(), 600)
    engines = {name: engine_of(model, name, groups) for name in recipes}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step(batches(), tokens_seen=10**6)
            seconds[name].append(time.perf_counter() - start)
    print(f"{model}, {BATCH} x {LENGTH} tokens, {rounds} rounds")
    print(f"{'recipe':24} {'step':>8} {'to bf16':>8} {'to fp32':>8}")
    for name, times in seconds.items():
        ratios = (_ratio(times, seconds.get(base)) for base in ("bf16", "fp32"))
        print(f"{name:24} {statistics.median(times):7.2f}s {' '.join(ratios)}")


def _ratio(times: list[float], base: list[float] | None) -> str:
    if base is None:
        return " " * 8
    ratio = statistics.median(own / other for own, other in zip(times, base, strict=True))
    return f"{ratio:7.2f}x"


def engine_of(model: str, recipe: str, groups: Any) -> Any:
    """Build the engine of a recipe; its first step is taken here."""
    import torch

    from hybrid_train.config import compose
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    sizes = [f"train.sequence_length={LENGTH}", f"train.global_batch={BATCH}"]
    sizes += [f"train.microbatch={BATCH}", f"model.vocab_size={VOCAB}"]
    base = ["experiment=tiny_cpu", f"model={model}", "run_dir=/nonexistent"]
    kept = f"precision.fp8_param_gather={recipe.endswith(IN_FP8)}"
    recipe = recipe.removesuffix(IN_FP8)
    job = compose.compose("train", [*base, f"precision={recipe}", kept, *sizes])
    built = build_model(job, groups, VOCAB, on_gpu=False)
    engine = build_engine(job, built, groups, torch.device("cpu"))
    engine.step(batches(), tokens_seen=10**6)
    return engine


def batches() -> Any:
    """Return one microbatch of fixed tokens."""
    from fixed_batch import fixed_batch

    return iter([fixed_batch(VOCAB, BATCH, LENGTH)])


if __name__ == "__main__":
    main()
