"""The job `train`: from a checked config to a trained model, or on from where a run stopped."""

from hybrid_train.config.schema.train import TrainJob
from hybrid_train.runtime.start import process


def run(job: TrainJob) -> int:
    """Train; return the exit code: 0, or 128 + signal if a signal stopped the run after a save."""
    with process(job.runtime, job.train.seed) as device:
        # Megatron may be imported only now: on a CPU its CUDA calls had to be redirected first.
        from hybrid_train.jobs.pretraining import train

        return train(job, device)
