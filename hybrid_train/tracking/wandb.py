"""Gateway to Weights & Biases."""

import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from hybrid_train.config.secrets import masked
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.tracking import Wandb, WandbMode
from hybrid_train.tracking.metrics import tag

ID_FILE = "wandb_run_id"


class WeightsAndBiases:
    """Logs to one W&B run per run folder: its id lies there, and a resumed run goes on with it.

    Offline, nothing leaves the machine; `wandb sync` sends it later.
    """

    def __init__(self, settings: Wandb, run_dir: Path, config: Mapping[str, Any]) -> None:
        if settings.mode is WandbMode.online and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "tracking.wandb.mode = online: this machine is not logged in; type `wandb login`, "
                "set WANDB_API_KEY, or take tracking.wandb.mode=offline"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        with _masked_command():
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=masked(settings.name or run_dir.resolve().name),
                id=_run_id(run_dir / ID_FILE),
                resume="allow",
                mode=settings.mode.value,
                dir=str(run_dir),
                config=dict(config),
                # Of git it would keep the address of the remote, which may hold a token.
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        # Our own step as the axis: W&B drops rows whose own counter goes back, as it does when a
        # run resumes from a checkpoint before its last row.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {tag(name): value for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _masked_command() -> Iterator[None]:
    """Hide credentials in the command line, which wandb 0.31 keeps as it finds it in sys.argv."""
    given = sys.argv
    sys.argv = [masked(word) for word in given]
    try:
        yield
    finally:
        sys.argv = given


def _run_id(path: Path) -> str:
    """Return the id kept in the file; make one on the first start."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
