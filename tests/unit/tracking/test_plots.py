"""Pictures are drawn from what was logged, whatever that is."""

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from hybrid_train.tracking import plots
from hybrid_train.tracking.gaps import Curve, compare, spread
from hybrid_train.tracking.jsonl import JsonLines
from hybrid_train.tracking.plots import plot_figures, plot_gaps, plot_losses


def run(folder: Path, steps: int, **more: float) -> Path:
    path = folder / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, steps + 1):
        lines.log(step, {"tokens": 1000 * step, "loss": 6 / step, **more})
    lines.close()
    return path


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"validation_loss": 3.0, "unigram_loss": 6.0},
        {"mtp_loss_1": 4.0, "mtp_loss_2": 5.0},
        {"validation_loss": math.nan},
    ],
    ids=["train only", "validation", "MTP", "not finite"],
)
def test_a_picture_is_drawn_of_whatever_was_logged(tmp_path: Path, more: dict[str, float]) -> None:
    path = tmp_path / "plots" / "loss.png"
    plot_losses(run(tmp_path, 5, **more), path, "runs/first")
    picture = imread(path)
    assert picture.shape[0] > 400
    assert picture.std() > 0  # not blank


def test_one_step_is_enough_for_a_picture(tmp_path: Path) -> None:
    plot_losses(run(tmp_path, 1), tmp_path / "loss.png", "runs/first")
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("losses", [(2.0, 2.2), (math.nan, 2.2)], ids=["finite", "diverged"])
def test_gaps_are_drawn_for_as_many_variants_as_there_are(
    tmp_path: Path, losses: tuple[float, float]
) -> None:
    def runs(*ends: float) -> dict[int, Curve]:
        return {n: Curve([10, 20, 30], [3.0, 2.5, end]) for n, end in enumerate(ends)}

    baseline = runs(2.0, 2.1)
    comparisons = {f"v{n}": compare(runs(*losses), baseline) for n in range(12)}
    path = tmp_path / "plots" / "gap.png"
    plot_gaps({"base": compare(baseline, baseline), **comparisons}, "base", path, "Gaps")
    assert imread(path).std() > 0


def test_figures_by_length_are_drawn_with_a_panel_for_each_metric(tmp_path: Path) -> None:
    by_length = {
        ("decoding.tokens_per_s", f"length={length}"): spread([1e4 / length, 2e4 / length])
        for length in (64, 256, 1024)
    }
    by_depth = {
        ("needle.accuracy", f"words={words} depth={depth}"): spread([0.25, 0.5])
        for words in (64, 128)
        for depth in ("0", "0.5")
    }
    by_position = {("heldout.loss", "position=64-255"): spread([3.0])}  # one is no line
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    plot_figures({"a": by_length, "b": {**by_length, **by_position}}, one, "Length")
    plot_figures({"a": {**by_length, **by_depth}}, both, "Length, depth")
    assert imread(both).shape[0] > imread(one).shape[0]
    assert imread(both).std() > 0


def test_figures_without_numbers_are_no_picture(tmp_path: Path) -> None:
    found = {("heldout.loss", ""): spread([3.0]), ("heldout.loss", "code"): spread([3.0])}
    plot_figures({"a": found}, tmp_path / "none.png", "Nothing")
    assert not (tmp_path / "none.png").exists()


def test_a_group_is_drawn_over_the_number_that_differs() -> None:
    found = {("d.a", f"length=256 drafts={n}"): spread([1.0 + n]) for n in (0, 1, 3)}
    found[("d.a", "length=256")] = spread([9.0])  # of another variant, which has no drafts
    lines = plots._series({"on": found}, "d.a")
    assert {name: [place for place, _ in points] for name, points in lines.items()} == {
        "on": [0, 1, 3]
    }
