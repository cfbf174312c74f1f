"""Our training step against transformers' NemotronH: same sizes, batch, threads, in one run.

    python tests/benchmarks/train_step.py [--rounds 8] [--threads 2]

Two processes take turns, a few steps each, so that a busy machine slows both. Each does a forward
pass, a backward pass, gradient clipping and an AdamW update on the same tokens in float32. Printed
are tokens/s (best round of each), their ratio, both peaks of memory, the share of the machine's own
matrix-product rate that our step reaches, and where our step spends its time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCAB, BATCH, LENGTH, STEPS_A_TURN = 4096, 4, 256, 3
OVERRIDES = [
    "experiment=tiny_cpu",
    "run_dir=/nonexistent",
    "model.pattern=MEM*EMEM-E",
    "model.hidden_size=256",
    f"model.vocab_size={VOCAB}",
    "model.attention.heads=8",
    "model.attention.kv_heads=2",
    "model.attention.head_dim=32",
    "model.mamba.heads=16",
    "model.mamba.head_dim=32",
    "model.mamba.state_size=128",
    "model.mamba.groups=2",
    "model.mamba.chunk_size=128",
    "model.mlp.intermediate_size=1024",
    "model.moe.experts=16",
    "model.moe.top_k=2",
    "model.moe.intermediate_size=256",
    "model.moe.shared_intermediate_size=512",
    "model.moe.latent_size=null",
    "model.moe.scaling_factor=1.0",
    f"train.sequence_length={LENGTH}",
    f"train.microbatch={BATCH}",
    f"train.global_batch={BATCH}",
    "precision=fp32",
]
# Ops of the profile by what they are; the first word that an op's name contains decides.
KINDS = {
    "GEMMs": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "mkldnn::"),
    "attention": ("scaled_dot_product",),
    "copies and layout": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "scatter"),
    "softmax and loss": ("softmax", "logsumexp", "CrossEntropy"),
    "optimizer": ("fused_adamw", "linalg_vector_norm"),
}


@dataclass(frozen=True)
class Worker:
    """A process that trains one of the two models when told to."""

    process: subprocess.Popen[str]

    def ask(self, question: str) -> Any:
        """Send one line, and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise RuntimeError("a worker died; its words stand above")
        return json.loads(line)["answer"]


def start(kind: str, threads: int) -> Worker:
    """Start the process of one model."""
    command = [sys.executable, __file__, "--worker", kind, "--threads", str(threads)]
    return Worker(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )


def compare(rounds: int, threads: int) -> None:
    """Let both take turns, and print what came out."""
    workers = {kind: start(kind, threads) for kind in ("ours", "transformers")}
    sizes = {kind: worker.ask("parameters") for kind, worker in workers.items()}
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: list[float] = []
    for _ in range(rounds):
        peaks.append(workers["ours"].ask("peak"))
        for kind, worker in workers.items():
            seconds[kind].append(worker.ask("steps"))
    tokens = BATCH * LENGTH * STEPS_A_TURN
    rates = {kind: tokens / min(times) for kind, times in seconds.items()}
    for kind, worker in workers.items():
        print(
            f"{kind:13} {rates[kind]:8.0f} tokens/s, {min(seconds[kind]) / STEPS_A_TURN:.3f} s a "
            f"step, peak memory {worker.ask('memory'):.0f} MB, {sizes[kind]:,} parameters"
        )
    paired = sorted(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))
    print(
        f"ratio of tokens/s: {rates['ours'] / rates['transformers']:.2f} (best rounds), "
        f"{paired[len(paired) // 2]:.2f} (median of pairs)"
    )
    reached = workers["ours"].ask("flops") * rates["ours"]
    print(
        f"float32 GEMMs reach {max(peaks) / 1e9:.0f} GFLOP/s on {threads} threads; our "
        f"step does {reached / 1e9:.0f} GFLOP/s of the model's: {reached / max(peaks):.0%}"
    )
    print("where our step spends its time:")
    for kind, share in sorted(workers["ours"].ask("profile").items(), key=lambda kv: -kv[1]):
        print(f"  {share:5.1%}  {kind}")
    for worker in workers.values():
        worker.process.terminate()


def our_step() -> tuple[Callable[[], None], dict[str, Callable[[], Any]]]:
    """Build our engine; return a step on fixed tokens, and answers about it."""
    import torch

    from hybrid_train.anatomy.counts import flops_per_token, parameters
    from hybrid_train.config import compose
    from hybrid_train.data.batch import Batch
    from hybrid_train.jobs.networks import build_engine
    from hybrid_train.megatron.data_parallel import build_groups
    from hybrid_train.model.build import build_model
    from hybrid_train.tracking.throughput import peak_flops

    job = compose.compose("train", OVERRIDES)
    groups = build_groups(job.parallel, 600)
    device = torch.device("cpu")
    engine = build_engine(job, build_model(job, groups, VOCAB, on_gpu=False), groups, device)
    rows = tokens()
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.ones(BATCH, LENGTH), positions)
    answers = {
        "parameters": lambda: parameters(job.model, VOCAB).total,
        "flops": lambda: flops_per_token(job.model, VOCAB, LENGTH).training,
        "peak": lambda: peak_flops(device).flops,
    }
    return lambda: engine.step(iter([batch]), tokens_seen=10**6), answers


def their_step() -> tuple[Callable[[], None], dict[str, Callable[[], Any]]]:
    """Build transformers' model of the same sizes; return the same as `our_step`."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    names = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    config = NemotronHConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        layers_block_type=[names[letter] for letter in "MEM*EMEM-E"],
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=16,
        mamba_head_dim=32,
        ssm_state_size=128,
        n_groups=2,
        chunk_size=128,
        intermediate_size=1024,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=512,
        use_cache=False,
    )
    model = NemotronHForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = tokens()

    def step() -> None:
        optimizer.zero_grad()
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, {"parameters": lambda: sum(p.numel() for p in model.parameters())}


def tokens() -> Any:
    """Return the tokens that both train on, [BATCH, LENGTH + 1]."""
    import torch

    return torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def serve(kind: str, threads: int) -> None:
    """Answer questions until the other side is gone."""
    import torch

    from hybrid_train.runtime.start import process
    from hybrid_train.schema.runtime import Device, Runtime

    torch.set_num_threads(threads)
    if kind == "ours":
        with process(Runtime(device=Device.cpu, threads=threads), 0):
            answer_all(*our_step())
    else:
        answer_all(*their_step())


def answer_all(step: Callable[[], None], answers: dict[str, Callable[[], Any]]) -> None:
    """Warm up, then answer each line of the input with one line of JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    answers["steps"] = lambda: timed(step)
    answers["profile"] = lambda: profile(step)
    answers["memory"] = lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for line in sys.stdin:
        print(json.dumps({"answer": answers[line.strip()]()}), flush=True)


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of one turn."""
    start_time = time.perf_counter()
    for _ in range(STEPS_A_TURN):
        step()
    return time.perf_counter() - start_time


def profile(step: Callable[[], None]) -> dict[str, float]:
    """Return the share of each kind of op in the time of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    shares: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        kinds = (kind for kind, words in KINDS.items() if any(w in event.key for w in words))
        other = "elementwise and reductions" if event.key.startswith("aten::") else "Python"
        shares[next(kinds, other)] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}


def main() -> None:
    """Compare, or serve as one of the two sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.threads)
    else:
        compare(options.rounds, options.threads)


if __name__ == "__main__":
    main()
