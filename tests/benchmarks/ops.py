"""Print how many times faster each tensor function is than the plain form of it, on this machine.

    python tests/benchmarks/ops.py [--threads 2] [--rounds 15]

Both forms run forward and backward in one process, taking turns, so that a busy machine slows
both alike; the figures are the fastest round of each. Sizes: 4 sequences of 256 tokens.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_train.ops.conv import causal_conv
from hybrid_train.ops.experts import expert_mlp
from hybrid_train.ops.logits import CrossEntropy, HeadPart, weighted_sum
from hybrid_train.ops.mixer import mixer_forward
from hybrid_train.ops.nonlinearity import squared_relu
from hybrid_train.ops.norm import gated_rms_norm, rms_norm
from hybrid_train.ops.scan import chunked_scan

BATCH, LENGTH, HIDDEN, HEADS, WIDTH, GROUPS, STATE = 4, 256, 256, 16, 32, 4, 64
INNER, CHANNELS = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATE
EXPERTS, CHUNK, VOCABULARY = 16, 128, 2048
Form = Callable[..., Tensor]


def plain_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Chunked scan in einsum, one expression per formula, heads expanded from groups."""
    b, c = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (b, c))
    steps = x * dt[..., None]
    xs, bs, cs = (t.unflatten(1, (-1, CHUNK)) for t in (steps, b, c))
    log_decay = (dt * a).unflatten(1, (-1, CHUNK)).transpose(2, 3)  # [B, K, H, Q]
    sums = log_decay.cumsum(-1)
    pairs = (sums[..., None] - sums[..., None, :]).tril().exp().tril()
    y = torch.einsum("bkthn,bkshn,bkhts,bkshp->bkthp", cs, bs, pairs, xs)
    added = torch.einsum("bkshn,bkhs,bkshp->bkhpn", bs, pairs[..., -1, :], xs)
    state, states = torch.zeros_like(added[:, 0]), []
    for index in range(added.shape[1]):
        states.append(state)
        state = sums[:, index, :, -1, None, None].exp() * state + added[:, index]
    y = y + torch.einsum("bkthn,bkhpn,bkht->bkthp", cs, torch.stack(states, 1), sums.exp())
    return y.flatten(1, 2) + x * d[:, None]


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2).contiguous()


def plain_mixer(
    packed: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, a: Tensor, d: Tensor
) -> Tensor:
    z, xbc, dt = packed.split([INNER, CHANNELS, HEADS], dim=-1)
    x, b, c = plain_conv(xbc, weight, bias).split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
    b, c = (t.unflatten(-1, (GROUPS, STATE)) for t in (b, c))
    y = plain_scan(x.unflatten(-1, (HEADS, WIDTH)), F.softplus(dt + dt_bias), a, b, c, d)
    return y.flatten(2) * F.silu(z)


def plain_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    groups = (x * F.silu(gate)).unflatten(-1, (GROUPS, -1))
    return F.rms_norm(groups, groups.shape[-1:], None, 1e-5).flatten(-2) * weight


def plain_experts(counts: list[int]) -> Form:
    def run(x: Tensor, probs: Tensor, *weights: Tensor) -> Tensor:
        pairs = zip(weights[:EXPERTS], weights[EXPERTS:], strict=True)
        rows = zip(x.split(counts), probs.split(counts), pairs, strict=True)
        return torch.cat([(F.relu(t @ u.T) ** 2 * p[:, None]) @ d.T for t, p, (u, d) in rows])

    return run


def cases() -> list[tuple[str, Form, Form, list[Tensor]]]:
    """Name, plain form, our form, and the operands of each function."""
    normal = torch.randn
    tokens, labels = BATCH * LENGTH, torch.randint(VOCABULARY, (BATCH * LENGTH,))
    counts = torch.randint(EXPERTS, (2 * tokens,)).bincount(minlength=EXPERTS).tolist()
    matrices = [normal(HIDDEN, HIDDEN) / 16 for _ in range(2 * EXPERTS)]
    taps, bias = normal(CHANNELS, 4), normal(CHANNELS)
    dt_bias, a, d = normal(HEADS) - 3, -normal(HEADS).exp(), normal(HEADS)
    scan = [normal(BATCH, LENGTH, HEADS, WIDTH), normal(BATCH, LENGTH, HEADS).sigmoid() / 10, a]
    scan += [normal(BATCH, LENGTH, GROUPS, STATE) for _ in "bc"]
    packed = normal(BATCH, LENGTH, INNER + CHANNELS + HEADS)
    gated = [normal(BATCH, LENGTH, INNER), normal(BATCH, LENGTH, INNER), normal(INNER)]
    return [
        ("scan", plain_scan, lambda *t: chunked_scan(*t[:5], chunk=64, d=t[5])[0], [*scan, d]),
        ("conv + silu", plain_conv, causal_conv, [normal(BATCH, LENGTH, CHANNELS), taps, bias]),
        (
            "mixer",
            plain_mixer,
            lambda *t: mixer_forward(*t, head_width=WIDTH, groups=GROUPS, chunk=CHUNK),
            [packed, taps, bias, dt_bias, a, d],
        ),
        (
            "rms norm",
            lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-5),
            lambda x, w: rms_norm(x, w, 1e-5),
            [normal(BATCH, LENGTH, HIDDEN), normal(HIDDEN)],
        ),
        (
            "gated norm",
            plain_norm,
            lambda x, z, w: gated_rms_norm(x, z, w, 1e-5, INNER // GROUPS),
            gated,
        ),
        ("relu squared", lambda x: F.relu(x) ** 2, squared_relu, [normal(tokens, 4 * HIDDEN)]),
        (
            "experts",
            plain_experts(counts),
            lambda x, p, *w: expert_mlp(x, w[:EXPERTS], w[EXPERTS:], counts, p),
            [normal(2 * tokens, HIDDEN), torch.rand(2 * tokens), *matrices],
        ),
        (
            "head, cross-entropy",
            lambda x, w: F.cross_entropy(x @ w.t(), labels, reduction="sum"),
            lambda x, w: weighted_sum(
                x, HeadPart(w, VOCABULARY), CrossEntropy(labels), torch.ones(tokens)
            )[0],
            [normal(tokens, HIDDEN), normal(VOCABULARY, HIDDEN)],
        ),
    ]


def timed(form: Form, operands: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds of one forward and backward: by the clock, and of one processor's work."""
    weight = torch.ones(())
    wall, cpu = time.perf_counter(), time.process_time()
    y = form(*operands)
    torch.autograd.grad(y, operands, weight.expand_as(y).contiguous())
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'forward + backward':20}{'plain ms':>10}{'ours ms':>10}{'times':>8}   (cpu ms)")
    for name, plain, ours, operands in cases():
        for operand in operands:
            operand.requires_grad_()
        torch.testing.assert_close(ours(*operands), plain(*operands), rtol=1e-3, atol=1e-3)
        rounds = [(timed(plain, operands), timed(ours, operands)) for _ in range(options.rounds)]
        (slow, slow_cpu), (fast, fast_cpu) = (
            [1e3 * min(column) for column in zip(*form, strict=True)]
            for form in zip(*rounds, strict=True)
        )
        line = f"{name:20}{slow:10.2f}{fast:10.2f}{slow / fast:8.2f}"
        print(f"{line}   ({slow_cpu:.1f}, {fast_cpu:.1f})")


if __name__ == "__main__":
    main()
