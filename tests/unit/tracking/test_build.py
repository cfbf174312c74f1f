"""The trackers that a section asks for, the real libraries behind them."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.runtime import optional
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.tracking import Tracking, Wandb, WandbMode
from hybrid_train.tracking.jsonl import JsonLines, read_metrics
from hybrid_train.tracking.trackers import build_trackers

# TensorBoard and W&B bring warnings of their own dependencies with them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_metrics_jsonl_is_always_written(tmp_path: Path) -> None:
    trackers = build_trackers(Tracking(), tmp_path, 0, {})
    assert [type(tracker) for tracker in trackers] == [JsonLines]
    trackers[0].log(1, {"loss": 2.0})
    trackers[0].close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_tensorboard_and_wandb_are_not_imported_unless_wanted() -> None:
    code = (
        "import sys, hybrid_train.tracking.trackers; "
        "sys.exit(any(name in sys.modules for name in ('tensorboard', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "tracking"),
    [
        ("tensorboard", Tracking(tensorboard=True)),
        ("wandb", Tracking(wandb=Wandb(mode=WandbMode.offline))),
    ],
)
def test_a_missing_library_is_an_error_with_the_command_to_install_it(
    name: str, tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = optional.Status(optional.State.absent)
    monkeypatch.setattr(optional, "status", lambda _: absent)
    with pytest.raises(UserError, match=f"tracking.{name}.* needs {name}.*pip install {name}"):
        build_trackers(tracking, tmp_path, 0, {})
    assert not list(tmp_path.iterdir())  # a refused start writes nothing


def test_tensorboard_keeps_the_steps_up_to_the_checkpoint_and_those_after_the_resume(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: TID251 - reader
        EventAccumulator,
    )

    # Killed at step 4, resumed from step 2.
    for resume_step, steps, loss in [(0, range(1, 5), 1.0), (2, range(3, 6), 2.0)]:
        trackers = build_trackers(Tracking(tensorboard=True), tmp_path, resume_step, {})
        for step in steps:
            trackers[1].log(step, {"loss": loss})
        for tracker in trackers:
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/loss")
    seen = {event.step: event.value for event in events}
    assert seen == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}


def test_wandb_offline_keeps_one_run_per_folder(tmp_path: Path) -> None:
    tracking = Tracking(wandb=Wandb(mode=WandbMode.offline))
    ids = []
    for resume_step in (0, 1):
        trackers = build_trackers(tracking, tmp_path, resume_step, {"model": {"pattern": "M-"}})
        trackers[1].log(resume_step + 1, {"loss": 2.0})
        for tracker in trackers:
            tracker.close()
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert written
    assert all(file.stat().st_size > 0 for file in written)


def test_wandb_online_without_a_login_is_an_error_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    tracking = Tracking(wandb=Wandb(mode=WandbMode.online))
    with pytest.raises(UserError, match=r"wandb login.*WANDB_API_KEY.*mode=offline"):
        build_trackers(tracking, tmp_path, 0, {})
    assert not list(tmp_path.iterdir())  # a refused start writes nothing
