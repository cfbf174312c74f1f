"""The job `train`: from a checked config to a trained model, or on from where a run stopped."""

import threading

from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.train import TrainJob
from hybrid_train.runtime.start import process


def run(job: TrainJob) -> int:
    """Train; return the exit code: 0, or 128 + signal if a signal stopped the run after a save.

    A process may train one run after another: a run leaves nothing behind but imported libraries
    and, on a CPU, their redirected calls.

    Raises:
        UserError: if the run cannot start, or ends for a reason that the user can mend.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "a run listens for signals, which Python allows in its main thread alone: train there"
        )
    with process(job.runtime, job.train.seed) as device:
        # Megatron may be imported only now: on a CPU its CUDA calls had to be redirected first.
        from hybrid_train.jobs import pretraining

        try:
            return pretraining.train(job, device)
        finally:
            pretraining.leave_nothing_behind()
