"""A run goes on with other settings where they may change; others are refused by name."""

import logging
from pathlib import Path

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.frozen import freeze, reload
from hybrid_train.jobs.resume import changed
from hybrid_train.jobs.run_folder import require_same_run
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.train import TrainJob
from tests.sampled import sampled


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "läuft, a=1"
    freeze(compose("train", ["experiment=tiny_cpu"]), folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 256, "loss": 6.5}\n')
    return folder


def resumed(folder: Path, *lines: str) -> TrainJob:
    """Compose as the command line does, and claim the folder."""
    job = compose("resume", [f'run_dir="{folder}"', *lines])
    run = reload(Path(job.run_dir), lambda saved: changed(saved, job.overrides))
    require_same_run(run)
    return run


def test_what_may_change_changes_and_is_said(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = resumed(run_dir, "train.tokens=1M", "++checkpoint.keep=7", "runtime=cpu")
    assert (run.train.tokens, run.checkpoint.keep) == ("1M", 7)
    assert "checkpoint.keep: 2 before, 7 from here on" in caplog.text
    assert resumed(run_dir) == reload(run_dir)


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ("train.seed=7", UserError, "train.seed: 1234 there, 7 here"),
        ("schedule=cosine", ConfigError, "goes on with what it began with"),
        *sampled(
            [
                ("train.tokens=???", ConfigError, "train.tokens"),
                ("experiment=quickstart", ConfigError, "goes on with what it began with"),
                ("train.tokns=1M", ConfigError, "nearest: train.tokens=1M"),
                ("train.tokens=soon", ConfigError, "must be a number of tokens"),
                ("parallel=tp3", ConfigError, "must be one of"),
                ("lonely", ConfigError, "write settings as KEY=VALUE"),
            ]
        ),
    ],
)
def test_what_may_not_change_is_refused_by_name(
    run_dir: Path, line: str, error: type[UserError], text: str
) -> None:
    with pytest.raises(error, match=text):
        resumed(run_dir, line)
