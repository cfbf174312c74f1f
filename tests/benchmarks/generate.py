"""Cached decoding against a full forward pass per token: the quickstart model, untrained.

    python tests/benchmarks/generate.py [override ...]

Overrides are those of `hybrid-train train`, such as model=tiny or runtime.threads=1. Both ways are
timed in turn, so that a busy machine slows them alike; the best round of each counts.
"""

import sys
import time
from collections.abc import Callable

import torch

from hybrid_train.config.compose import compose
from hybrid_train.runtime.start import process
from hybrid_train.schema.train import TrainJob

VOCAB = 2048
LENGTH = 256  # tokens before the timed ones
STEPS = 16  # timed tokens of a round
ROUNDS = 5


def main() -> None:
    job = compose("train", ["experiment=quickstart", "run_dir=unused", *sys.argv[1:]])
    with process(job.runtime, job.train.seed) as device:
        measure(job, device)


def measure(job: TrainJob, device: torch.device) -> None:
    from hybrid_train.generation.decode import Cache

    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model

    groups = build_groups(job.parallel, job.runtime.timeout_s)
    model = build_model(job, groups, VOCAB, on_gpu=device.type == "cuda").chunks[0].eval()
    print(
        f"{job.model.pattern}, hidden {job.model.hidden_size}, after {LENGTH} tokens, "
        f"{torch.get_num_threads()} thread(s)"
    )
    for batch in (1, 8):
        tokens = torch.randint(VOCAB, (batch, LENGTH), device=device)

        def cached(memory: Cache, token: torch.Tensor = tokens[:, -1:]) -> None:
            for _ in range(STEPS):
                memory.read(token)

        def whole(tokens: torch.Tensor = tokens) -> None:
            with torch.inference_mode():
                model(tokens)

        cached_s, whole_s = [], []
        for _ in range(ROUNDS):
            memory = Cache(model, batch, LENGTH + STEPS)
            memory.read(tokens)
            cached_s.append(seconds(lambda memory=memory: cached(memory)) / STEPS)
            whole_s.append(seconds(whole))
        fast, slow = batch / min(cached_s), batch / min(whole_s)
        print(
            f"{batch} sequence(s): cached {fast:.0f} tokens/s, full pass {slow:.0f} tokens/s, "
            f"ratio {fast / slow:.1f}"
        )


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
