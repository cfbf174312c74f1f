"""The summary says what happened, with the right signs."""

from pathlib import Path

from hybrid_train.tracking.console import summarise
from hybrid_train.tracking.jsonl import JsonLines


def run(folder: Path, validation: float = 3.0, steps: int = 40, **more: float) -> Path:
    lines = JsonLines(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        metrics = {"tokens": 50_000 * step, "loss": 6.0 if step <= 20 else 3.5}
        # The first step warms up: it must not spoil the speed.
        metrics |= {"tokens_per_s": 12_000.0, "step_time_s": 30.0 if step == 1 else 2.0, "mfu": 0.3}
        if step % 20 == 0:
            metrics |= {"validation_loss": validation, "unigram_loss": 6.25, **more}
        lines.log(step, metrics)
    lines.close()
    return folder


def test_length_losses_and_speed_are_told(tmp_path: Path) -> None:
    text = summarise(run(tmp_path), peak="100 GFLOP/s (timed at start)")
    assert "Trained 40 steps, 2M tokens, in 1m48s of steps." in text
    assert (
        "Train loss went from 6.000 at the first step to 3.500 nats per token, mean of the last 4 "
        "steps." in text
    )
    assert "12k tokens/s, 2.00s a step (medians); MFU 30.0% of 100 GFLOP/s" in text


def test_validation_is_compared_with_the_unigram_distribution(tmp_path: Path) -> None:
    text = summarise(run(tmp_path))
    assert "Validation loss is 3.000 nats per token." in text
    assert "cross-entropy of 6.250" in text
    assert "the model is 3.250 nats per token below it" in text


def test_a_model_worse_than_the_unigram_distribution_is_not_praised(tmp_path: Path) -> None:
    assert "the model is 0.750 nats per token ABOVE it" in summarise(run(tmp_path, validation=7.0))


def test_a_student_is_compared_by_its_cross_entropy(tmp_path: Path) -> None:
    parts = {"validation_cross_entropy": 4.0, "validation_agreement": 0.5}
    text = summarise(run(tmp_path, validation=0.1, **parts))
    assert "divergence from the teacher; the cross-entropy is 4.000, and for 50.0% of" in text
    assert "the model is 2.250 nats per token below it" in text


def test_only_what_is_there_is_listed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    text = summarise(tmp_path)
    assert str(tmp_path / "checkpoints") in text
    assert str(tmp_path / "metrics.jsonl") in text
    assert "TensorBoard" not in text


def test_a_recorded_trace_is_named_with_its_viewer(tmp_path: Path) -> None:
    run(tmp_path)
    assert "perfetto" not in summarise(tmp_path)
    trace = tmp_path / "profile" / "steps_5_to_6_rank_0.json.gz"
    trace.parent.mkdir()
    trace.touch()
    text = summarise(tmp_path)
    assert f"  trace of steps   {trace}\n" in text
    assert "open it at https://ui.perfetto.dev" in text


def test_the_next_commands_can_be_typed_as_they_stand(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    text = summarise(run(folder), commands=["hybrid-train train train.tokens=4M"])
    assert f"  hybrid-train generate 'checkpoint=\"{folder}\"' prompt=import" in text
    assert text.endswith("  hybrid-train train train.tokens=4M")


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    JsonLines(tmp_path / "metrics.jsonl").close()
    assert "No step was done" in summarise(tmp_path)
