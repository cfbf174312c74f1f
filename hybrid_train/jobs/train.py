"""The job `train`: from a checked config to a trained model, or on from where a run stopped."""

import logging

import torch

from hybrid_train.config import checks
from hybrid_train.config.check_native import hardware_notes, on_a_gpu
from hybrid_train.config.problems import ConfigError
from hybrid_train.config.schema.precision import Backend
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process

_log = logging.getLogger(__name__)


def run(job: TrainJob) -> int:
    """Train; return the exit code: 0, or 128 + signal if a signal stopped the run after a save."""
    with process(job.runtime, job.train.seed) as device:
        require_hardware(job, device)
        # Megatron may be imported only now: on a CPU its CUDA calls had to be redirected first.
        from hybrid_train.jobs.pretraining import train

        return train(job, device)


def require_hardware(job: TrainJob, device: torch.device) -> None:
    """Refuse what the GPU that was found does not compute; say what one would where there is none.

    Raises:
        ConfigError: if `runtime.device=auto` has found a GPU that is to compute what it cannot.
    """
    notes = hardware_notes(job)
    if notes and device.type == "cuda" and job.precision.backend is Backend.auto:
        error = ConfigError(checks.check(on_a_gpu(job), ranks.world_size()))
        error.everywhere = True
        raise error
    if notes:
        words = "\n".join(f"  {note}" for note in notes)
        _log.info("quantized products are emulated; a GPU would refuse this run:\n%s", words)
