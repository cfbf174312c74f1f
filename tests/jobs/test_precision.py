"""A quantized run: what it says of its formats, how it goes on, and how it is healed."""

import json
from pathlib import Path

import pytest

from tests.jobs.command import Finished, assert_equal_to_the_bit, metrics, train

pytestmark = pytest.mark.xdist_group("train")
STEPS = 8
HEALING = (
    "train.phases=[{name: quantized}, "
    "{name: healing, start: 75%, precision_exceptions: [{format: bf16}]}]"
)


@pytest.fixture(scope="module")
def command(steady: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *steady, "precision=nvfp4", "precision.statistics_interval=4",
        "train.validation_interval=4", f"train.tokens={STEPS * 256}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...]
) -> tuple[Path, Finished]:
    run_dir = tmp_path_factory.mktemp("quantized") / "run"
    return run_dir, train(run_dir, *command)


def audited(run_dir: Path) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads((run_dir / "precision.json").read_text())
    return found


def statistics(run_dir: Path) -> list[dict[str, float]]:
    text = (run_dir / "precision_statistics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_first_step_says_what_every_layer_multiplied(run: tuple[Path, Finished]) -> None:
    run_dir, finished = run
    assert finished.code == 0, finished.err
    assert "quantized GEMMs: emulated (no GPU)" in finished.said
    assert "GEMMs of this step, as asked" in finished.said
    assert "mamba.out_proj       mxfp8   1, 1    exception 2: mamba.out_proj" in finished.said
    (rows,) = audited(run_dir).values()
    assert all(row["as_asked"] for row in rows)
    (row,) = (row for row in rows if (row["module"], row["gemm"]) == ("mamba.in_proj", "wgrad"))
    assert row["operands"] == [
        "e2m1, 1x16, e4m3 scales, rotated, stochastic x e2m1, 1x16, e4m3 scales, rotated"
    ]


@pytest.mark.slow
def test_the_table_holds_the_layers_of_all_processes(
    run: tuple[Path, Finished], command: tuple[str, ...], tmp_path: Path
) -> None:
    two = ("parallel.pipeline=2", "train.microbatch=1", "train.tokens=512")
    finished = train(tmp_path / "stages", *command, *two, processes=2)
    assert finished.code == 0, finished.err
    assert audited(tmp_path / "stages") == audited(run[0])


def test_what_rounding_does_is_measured_at_the_interval(run: tuple[Path, Finished]) -> None:
    run_dir, _ = run
    lines = statistics(run_dir)
    assert {line["step"] for line in lines} == {4, 8}
    assert all(0 < line["rounding_error"] < 0.5 for line in lines)
    measured = {line["step"] for line in metrics(run_dir) if "rounding_error/gradient" in line}
    assert measured == {4, 8}


@pytest.mark.slow
def test_a_run_in_two_halves_rounds_by_chance_as_the_whole_did(
    run: tuple[Path, Finished], command: tuple[str, ...], tmp_path: Path
) -> None:
    half = tmp_path / "halves"
    first = train(half, *command, f"train.tokens={STEPS * 128}")
    assert first.code == 0, first.err
    second = train(half, *command)
    assert second.code == 0, second.err
    assert_equal_to_the_bit(half, run[0], STEPS)
    assert statistics(half) == statistics(run[0])


def test_a_phase_heals_the_run_in_bfloat16(
    run: tuple[Path, Finished], command: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "healed"
    finished = train(run_dir, *command, HEALING)
    assert finished.code == 0, finished.err
    tables = audited(run_dir)
    assert set(tables) == {"1", "7"}
    assert {row["asked"] for row in tables["7"]} == {"bf16"}
    assert all(row["as_asked"] for row in tables["7"])
    before = [line["loss"] for line in metrics(run[0])]
    healed = [line["loss"] for line in metrics(run_dir)]
    assert healed[:6] == before[:6]
    assert healed[6] != before[6]


@pytest.mark.slow
def test_weights_in_fp8_train_as_those_in_bfloat16_and_are_healed(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """In two parts, the second of which begins in the phase that has no weights in FP8 any more."""
    # Unclipped: a norm is summed in the order of the buffers, which are others.
    healing = HEALING.replace("75%", "1536")
    shared = (*command, "precision=fp8_tensorwise", "precision.exceptions=[]", healing)
    shared += ("optimizer.clip_grad_norm=1e9",)
    plain, kept, in_fp8 = tmp_path / "plain", tmp_path / "kept", "precision.fp8_param_gather=true"
    finished = [
        train(plain, *shared),
        train(kept, *shared, in_fp8, "train.tokens=1792"),
        train(kept, *shared, in_fp8),
    ]
    assert [one.code for one in finished] == [0, 0, 0], [one.err for one in finished]
    assert [line["loss"] for line in metrics(kept)] == [line["loss"] for line in metrics(plain)]
    assert audited(kept)["1"] == audited(plain)["1"]
    assert audited(kept)["7"] == audited(plain)["7"]
    assert (
        "FP8 parameters: weights of 12 of 21 linear layers, kept and gathered" in finished[1].said
    )
