"""Which formats of matrix products a GPU computes itself."""

from hybrid_train.config.schema.train import TrainJob


def require_formats(job: TrainJob) -> None:
    """Raise a UserError for what this GPU lacks."""
    raise NotImplementedError
