"""How fast operands are quantized: as a part of the speed of a copy in float32, and by the clock.

    python tests/benchmarks/quantize.py [--threads 1 2] [--rounds 20] [--large 3072 2048]
                                        [--small 64 128] [--medium 1024 512] [--schemes nvfp4_rows]

A round copies a matrix into memory that is there and then quantizes it, so that a busy machine
slows both alike; figures are the fastest of the rounds. With one thread the time is that of the
processor, which does not count what others take; with more, threads that wait count as well, so it
is that of the clock. The copy reads and writes float32 whatever the type of the matrix. Noise is
drawn within the time of schemes that round stochastically. The large matrix and its copy together
are larger than most caches; each is below 32 MiB, up to which glibc keeps freed memory.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_train.precision.formats import Noise
from hybrid_train.precision.operands import quantize_dequantize
from hybrid_train.precision.recipes import (
    Element,
    Scale,
    Scheme,
    Shape,
)
from hybrid_train.runtime.cpu import keep_freed_memory

_POWER, _VECTOR, _SQUARE = Scale.power_of_two, Shape.vector, Shape.square
SCHEMES = {
    "fp8_tensorwise": Scheme(Element.e4m3, Scale.fp32, Shape.tensor),
    "fp8_e5m2": Scheme(Element.e5m2, Scale.fp32, Shape.tensor),
    "fp8_rows": Scheme(Element.e4m3, _POWER, _VECTOR, 128),
    "fp8_squares": Scheme(Element.e4m3, _POWER, _SQUARE, 128),
    "mxfp8": Scheme(Element.e4m3, Scale.e8m0, _VECTOR, 32),
    "mxfp4": Scheme(Element.e2m1, Scale.e8m0, _VECTOR, 32),
    "nvfp4_rows": Scheme(Element.e2m1, Scale.e4m3, _VECTOR, 16),
    "nvfp4_squares": Scheme(Element.e2m1, Scale.e4m3, _SQUARE, 16),
    "nvfp4_by_chance": Scheme(Element.e2m1, Scale.e4m3, _VECTOR, 16, stochastic=True),
    "nvfp4_turned": Scheme(Element.e2m1, Scale.e4m3, _VECTOR, 16, hadamard=True),
    "nvfp4_both": Scheme(Element.e2m1, Scale.e4m3, _VECTOR, 16, stochastic=True, hadamard=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    for name, shape in (("large", [3072, 2048]), ("medium", [1024, 512]), ("small", [64, 128])):
        parser.add_argument(f"--{name}", type=int, nargs=2, default=shape)
    options = parser.parse_args()
    keep_freed_memory()  # as training does; else fresh memory for the result costs more than all
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"threads: {threads}")
        shapes = (options.large, options.medium, options.small)
        sizes = [f"{rows} x {columns}" for rows, columns in shapes]
        print(f"{'':27}{sizes[0]:>18}{sizes[1]:>18}{sizes[2]:>18}")
        print(f"{'scheme':16}{'axis':>5}{'type':>6}" + f"{'of copy':>9}{'us':>9}" * len(shapes))
        for name in options.schemes:
            for axis in (0, 1):
                for kind in (torch.float32, torch.bfloat16):
                    matrices = [torch.randn(*shape).to(kind) for shape in shapes]
                    figures = [
                        "{:9.3f}{:9.0f}".format(*measured(m, SCHEMES[name], axis, options.rounds))
                        for m in matrices
                    ]
                    short = "fp32" if kind is torch.float32 else "bf16"
                    print(f"{name:16}{axis:5}{short:>6}" + "".join(figures), flush=True)


def measured(matrix: Tensor, scheme: Scheme, axis: int, rounds: int) -> tuple[float, float]:
    """Return the speed as a part of that of a copy, and microseconds; small ones go on longer."""
    source, target = torch.randn(2, *matrix.shape)

    random = Noise()

    def quantized() -> None:
        noise = random.draw(matrix) if scheme.stochastic else None
        quantize_dequantize(matrix, scheme, axis, noise=noise)

    rounds *= 1 if matrix.numel() > 1 << 20 else 10
    times = [(seconds(lambda: target.copy_(source)), seconds(quantized)) for _ in range(rounds)]
    copy, own = (min(column) for column in zip(*times, strict=True))
    return copy / own, own * 1e6


def seconds(run: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


if __name__ == "__main__":
    main()
