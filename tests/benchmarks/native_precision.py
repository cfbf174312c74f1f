"""A training step with products that the GPU quantizes against one in bfloat16, in one run.

    python tests/benchmarks/native_precision.py [--rounds 10] [--hidden 4096] [--length 4096]

For each format that the GPU has, both engines take turns, a few steps each, after a warm-up.
Printed are milliseconds a step (median of the rounds) and the ratio of paired rounds. It runs on a
GPU with Transformer Engine and mamba-ssm alone; it has not run yet, as the machine of the trunk has
none.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

VOCAB, STEPS_A_TURN, WARM_UP = 32768, 5, 5
FORMATS = ("fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4")


def overrides(hidden: int, length: int, format: str) -> list[str]:
    """A model of a few layers of every kind, as wide as asked."""
    return [
        "experiment=tiny_cpu",
        "run_dir=/nonexistent",
        "runtime=auto",
        "runtime.device=cuda",
        "runtime.kernels=fused",
        "precision=bf16",
        f"precision.format={format}",
        "model.pattern=MEM*M-",
        f"model.hidden_size={hidden}",
        f"model.vocab_size={VOCAB}",
        f"model.attention.heads={hidden // 128}",
        "model.attention.kv_heads=8",
        "model.attention.head_dim=128",
        f"model.mamba.heads={hidden // 32}",
        "model.mamba.head_dim=64",
        "model.mamba.state_size=128",
        "model.mamba.groups=8",
        "model.mamba.chunk_size=128",
        f"model.mlp.intermediate_size={4 * hidden}",
        "model.moe.experts=8",
        "model.moe.top_k=2",
        f"model.moe.intermediate_size={hidden}",
        f"model.moe.shared_intermediate_size={2 * hidden}",
        "model.moe.latent_size=null",
        f"train.sequence_length={length}",
        "train.microbatch=1",
        "train.global_batch=1",
    ]


def step_of(lines: list[str], groups: Any) -> Callable[[], None]:
    """Build an engine; return a step on fixed tokens."""
    import torch
    from fixed_batch import fixed_batch

    from hybrid_train.config import compose
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.model.build import build_model

    job = compose.compose("train", lines)
    built = build_model(job, groups, VOCAB, on_gpu=True)
    engine = build_engine(job, built, groups, torch.device("cuda"))
    batch = fixed_batch(VOCAB, 1, job.train.sequence_length)
    return lambda: engine.step(iter([batch]), tokens_seen=10**6)


def milliseconds(step: Callable[[], None]) -> float:
    """Time a turn by the clock of the GPU; return the milliseconds of a step."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS_A_TURN):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / STEPS_A_TURN


def compare(options: Any, groups: Any, format: str) -> str:
    """Let a format and bfloat16 take turns; return the line that says what came out."""
    quantized = step_of(overrides(options.hidden, options.length, format), groups)
    plain = step_of(overrides(options.hidden, options.length, "bf16"), groups)
    for step in (quantized, plain):
        for _ in range(WARM_UP):
            step()
    pairs = [(milliseconds(quantized), milliseconds(plain)) for _ in range(options.rounds)]
    own, others = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(other / one for one, other in pairs)
    return f"{format:15} {own:8.2f} ms, bf16 {others:8.2f} ms, {ratio:.2f} times as fast"


def main() -> None:
    """Compare every format that the GPU has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("this compares products that a GPU quantizes, and there is no GPU here")
    from hybrid_train.megatron.data_parallel import build_groups, destroy_groups
    from hybrid_train.planning.gpu_formats import is_native
    from hybrid_train.precision.te import present_gpu
    from hybrid_train.runtime.start import process
    from hybrid_train.schema.parallel import Parallel
    from hybrid_train.schema.precision import GemmFormat
    from hybrid_train.schema.runtime import Device, Runtime

    gpu = present_gpu()
    print(f"{gpu.name}, hidden {options.hidden}, {options.length} tokens a step")
    with process(Runtime(device=Device.cuda), 0):
        groups = build_groups(Parallel(), 600)
        for format in FORMATS:
            if is_native(GemmFormat(format), gpu):
                print(compare(options, groups, format))
            else:
                print(f"{format:15} not computed by this GPU")
        destroy_groups()


if __name__ == "__main__":
    main()
