"""Speed of training: tokens/s, step time, and MFU against a stated peak."""

import time
from dataclasses import dataclass

import torch

from hybrid_train.config import cards

_GEMM_SIZE = 1024  # rows and columns; large enough that the GEMM is bound by arithmetic
_MEASURE_S = 0.2
_LEAST_GEMMS = 5  # on a busy machine some are slowed down by others


@dataclass(frozen=True)
class Peak:
    """What one device can do at most, and where the figure comes from."""

    flops: float | None  # per second; None: not known
    source: str  # for the user, shown once


def peak_flops(device: torch.device, peak_tflops: float | None = None) -> Peak:
    """Find the peak of one device, which MFU is a share of.

    Args:
        device: a GPU is looked up by its name; a CPU is measured, with the threads of this process.
        peak_tflops: the figure of the user, which goes first.
    """
    if peak_tflops is not None:
        return Peak(peak_tflops * 1e12, f"{peak_tflops:g} TFLOP/s (runtime.peak_tflops)")
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return _measured_peak()


def gpu_peak(name: str) -> Peak:
    """Look up the dense BF16 peak of a GPU by its name in the cards of conf/hardware.

    Raises:
        ConfigError: if the file of a card is faulty.
    """
    found = cards.card_of_device(name)
    if found is None:
        why = f"not known: no card of conf/{cards.GROUP} names {name}"
    elif (tflops := found[1].peak_tflops.bf16) is None:
        why = f"not known: conf/{cards.GROUP}/{found[0]}.yaml has no figure for {name}"
    else:
        return Peak(tflops * 1e12, f"{tflops:g} TFLOP/s (dense BF16 peak of {name})")
    return Peak(None, f"{why}, so no MFU; give it as runtime.peak_tflops")


def _measured_peak() -> Peak:
    """Time a float32 GEMM; the best of as many as fit into the time, of five at least."""
    own = torch.Generator()  # the random numbers of the run are left where a checkpoint put them
    a = torch.rand(_GEMM_SIZE, _GEMM_SIZE, generator=own)
    b = torch.rand(_GEMM_SIZE, _GEMM_SIZE, generator=own)
    a @ b  # the first one starts the threads
    timings: list[float] = []
    while sum(timings) < _MEASURE_S or len(timings) < _LEAST_GEMMS:
        start = time.perf_counter()
        a @ b
        timings.append(time.perf_counter() - start)
    flops = 2 * _GEMM_SIZE**3 / min(timings)
    threads = torch.get_num_threads()
    return Peak(
        flops,
        f"{flops / 1e9:.0f} GFLOP/s (float32 GEMM of {_GEMM_SIZE} x {_GEMM_SIZE}, "
        f"timed at start with {threads} thread{'s' if threads > 1 else ''})",
    )


@dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into the metrics of speed."""

    peak_flops: float | None  # of one device, per second; None: no MFU
    num_devices: int

    def measure(self, tokens: int, step_time_s: float, flops_per_token: float) -> dict[str, float]:
        """Return tokens_per_s, step_time_s and, where the peak is known, mfu.

        MFU is the model's FLOPs of the tokens over what all devices could do in that time
        (Chowdhery et al., arXiv:2204.02311, appendix B).

        Args:
            tokens: tokens of the step, over all ranks.
            step_time_s: wall time of the step.
            flops_per_token: of training, `flops_per_token(...).training` in anatomy/counts.py, and
                of the forward passes of teachers that run ahead.
        """
        tokens_per_s = tokens / step_time_s
        measured = {"tokens_per_s": tokens_per_s, "step_time_s": step_time_s}
        if self.peak_flops is not None:
            peak = self.peak_flops * self.num_devices
            measured["mfu"] = tokens_per_s * flops_per_token / peak
        return measured
