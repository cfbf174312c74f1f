"""A run from its command line to the files that it leaves."""

import math
from pathlib import Path

import pytest

from tests.jobs.command import Finished, checkpoints, contents, metrics, train
from tests.jobs.conftest import STEPS

pytestmark = pytest.mark.xdist_group("train")

Run = tuple[Path, Finished]
# tiny_cpu is ME*-/*E: experts in layer 2, one MTP depth with experts in its own layer 2.
EVERY_STEP = {
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_time_s", "mfu",
    "pause_s", "mtp_loss_1", "moe_aux_loss", "expert_load_2", "expert_load_mtp_2",
}  # fmt: skip
AT_VALIDATION = {"validation_time_s", "validation_loss", "validation_mtp_loss_1", "unigram_loss"}


def test_it_ends_well_and_says_where_things_lie(long_run: Run) -> None:
    run_dir, finished = long_run
    assert finished.code == 0, finished.err
    for place in ("checkpoints", "metrics.jsonl", "plots/loss.png", "config.yaml"):
        assert str(run_dir / place) in finished.out
        assert (run_dir / place).exists()
    assert f"hybrid-train generate checkpoint={run_dir}" in finished.out
    assert (run_dir / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "tokenizer" / "tokenizer.json").is_file()


def test_metrics_have_one_line_a_step_with_exactly_the_promised_fields(long_run: Run) -> None:
    lines = metrics(long_run[0])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [256 * step for step in range(1, STEPS + 1)]
    for line in lines:
        validated = line["step"] % 20 == 0
        assert set(line) - {"save_time_s"} == EVERY_STEP | (AT_VALIDATION if validated else set())
        assert all(math.isfinite(value) for value in line.values())


def test_loss_falls(long_run: Run) -> None:
    losses = [line["loss"] for line in metrics(long_run[0])]
    # An untrained model knows nothing of the 512 tokens; its logits add their variance / 2.
    assert losses[0] == pytest.approx(math.log(512), abs=0.7)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5


def test_validation_and_unigram_figures_are_printed(long_run: Run) -> None:
    run_dir, finished = long_run
    last = metrics(run_dir)[-1]
    assert f"Validation loss is {last['validation_loss']:.3f} nats per token" in finished.out
    assert f"cross-entropy of {last['unigram_loss']:.3f}" in finished.out


def test_newest_checkpoints_are_kept(long_run: Run) -> None:
    assert checkpoints(long_run[0]) == ["step_00000020", "step_00000030", "step_00000040"]


def test_the_same_command_says_that_the_run_is_complete(
    long_run: Run, steady: tuple[str, ...]
) -> None:
    run_dir, _ = long_run
    before = contents(run_dir)
    again = train(run_dir, *steady, f"train.tokens={STEPS * 256}")
    assert again.code == 0
    assert f"{run_dir} is complete" in again.said
    assert contents(run_dir) == before
