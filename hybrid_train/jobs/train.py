"""The job `train`: sets up the process, then runs a training run, which `pretraining.py` tells."""

import logging
import threading

import torch

from hybrid_train.config import checks
from hybrid_train.config.rules_of_precision import hardware_notes, on_a_gpu
from hybrid_train.runtime import ranks
from hybrid_train.runtime.start import process
from hybrid_train.schema.precision import Backend
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.train import TrainJob

_log = logging.getLogger(__name__)


def run(job: TrainJob) -> int:
    """Train; return the exit code: 0, or 128 + signal if a signal stopped the run after a save.

    A process may train one run after another: a run leaves nothing behind but imported libraries
    and, on a CPU, their redirected calls.

    Raises:
        UserError: if the run cannot start, or ends for a reason that the user can fix.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "a run listens for signals, which Python allows in its main thread alone: train there"
        )
    with process(job.runtime, job.train.seed) as device:
        require_hardware(job, device)
        # Megatron may be imported only now: on a CPU its CUDA calls had to be redirected first, and
        # torch.compile, which it calls at import and which would take a minute of the first step.
        from hybrid_train.jobs import pretraining
        from hybrid_train.megatron.data_parallel import destroy_groups

        try:
            return pretraining.train(job, device)
        finally:
            destroy_groups()  # they belong to the process, and the run may have failed anywhere


def require_hardware(job: TrainJob, device: torch.device) -> None:
    """Refuse what the GPU that was found does not compute; say what one would where there is none.

    Raises:
        ConfigError: if `runtime.device=auto` has found a GPU that is to compute what it cannot.
    """
    notes = hardware_notes(job)
    if notes and device.type == "cuda" and job.precision.backend is Backend.auto:
        error = ConfigError(checks.check(on_a_gpu(job), ranks.world_size()))
        error.on_all_ranks = True
        raise error
    if notes:
        words = "\n".join(f"  {note}" for note in notes)
        _log.info("quantized GEMMs are emulated; a GPU would refuse this run:\n%s", words)
