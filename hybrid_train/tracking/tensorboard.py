"""Gateway to TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from hybrid_train.tracking.metrics import tag


class TensorBoard:
    """Writes scalars over steps into `folder`. A resumed run hides what came after its step."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._writer = SummaryWriter(
            log_dir=str(folder), purge_step=resume_step + 1 if resume_step else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(tag(name), value, step)

    def close(self) -> None:
        self._writer.close()
