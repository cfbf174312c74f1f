"""What the loss of a student needs in memory and time beside its operands, ours and the plain way.

    python tests/benchmarks/distillation_memory.py [--tokens 2048 8192] [--threads 2]

Forward KL of two heads of 131,072 rows and 512 hidden units, with the gradients of the student's
hidden states and head, in float32. Operands are there before: both sets of hidden states, both
heads, and the buffers for the gradients. Each way runs in a process of its own; the peak is the
largest resident memory of the process less that before the loss. The plain way makes all logits at
once; it is left out where they would not fit.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from hybrid_train.ops.divergence import Distillation
from hybrid_train.ops.logits import HeadPart, weighted_sum
from hybrid_train.ops.reference import Reference

VOCAB, HIDDEN = 131_072, 512
PLAIN_TOKENS = 2048  # that the plain way has memory for: nine tensors of 1 GiB


def main() -> None:
    """Measure, and print; or one way, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(*measure(options.only, options.tokens[0], options.threads))
        return
    ours = {tokens: measured("ours", tokens, options.threads) for tokens in options.tokens}
    for tokens, (peak, seconds) in ours.items():
        print(f"{tokens} tokens, ours:  peak {peak:7.0f} MB, {seconds:5.1f} s of the processor")
        if tokens <= PLAIN_TOKENS:
            plain, longer = measured("plain", tokens, options.threads)
            print(f"{tokens} tokens, plain: peak {plain:7.0f} MB, {longer:5.1f} s of the processor")
            print(f"  ours / plain: {peak / plain:.3f} of the memory, {seconds / longer:.2f} of it")
    first, *_, last = (peak for peak, _ in ours.values())
    print(f"{options.tokens[-1]} against {options.tokens[0]} tokens: {last / first:.3f}")


def measured(way: str, tokens: int, threads: int) -> tuple[float, float]:
    """Run this program on one way alone; return MB and seconds."""
    command = [sys.executable, __file__, "--only", way]
    command += ["--tokens", str(tokens), "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    peak, seconds = map(float, done.stdout.split()[-2:])
    return peak, seconds


def measure(way: str, tokens: int, threads: int) -> tuple[float, float]:
    """Compute the loss and its gradients; return the peak above what was there, and seconds."""
    torch.set_num_threads(threads)
    mine = torch.randn(tokens, HIDDEN, requires_grad=True)
    theirs = torch.randn(tokens, HIDDEN)
    head = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    other = torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    labels, weights = torch.randint(VOCAB, (tokens,)), torch.ones(tokens)
    mine.grad, buffer = torch.zeros_like(mine), torch.zeros_like(head)
    warm_up = torch.randn(64, HIDDEN) @ head.detach()[:1024].t()  # what libraries set up
    del warm_up
    before = resident("VmRSS")
    start = time.process_time()
    if way == "ours":
        reference = Reference(theirs, HeadPart(other, VOCAB))
        part = HeadPart(head, VOCAB, gradient_buffer=buffer)
        total, _ = weighted_sum(mine, part, Distillation([(1.0, reference)], labels), weights)
        total.backward()
    else:
        head.grad = buffer
        target = torch.log_softmax(theirs @ other.t(), -1)
        found = torch.log_softmax(mine @ head.t(), -1)
        loss = torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)
        loss.backward()
    return resident("VmHWM") - before, time.process_time() - start


def resident(which: str) -> float:
    """Return the resident memory of this process, now or at its highest, in MB."""
    found = re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
