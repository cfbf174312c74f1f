"""A report of several runs: curves over each other, last values, what differs."""

import re
from pathlib import Path

import pytest

from hybrid_train.jobs import report
from hybrid_train.jobs.report import differing
from hybrid_train.schema.job_roots import ReportJob
from tests.unit.jobs.report_page import Page, figures
from tests.unit.jobs.synthetic_run import NASTY, make

START = 1_700_000_000.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, peak in (("seed=1", "0.001"), ("seed=2", "0.004"), (NASTY.replace("/", ""), "0.001")):
        run = make(folder / name, steps=100, start=START)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("peak_lr: 0.001", f"peak_lr: {peak}"))
    end = (folder / "seed=2" / "history.jsonl").read_text().replace('"finished"', '"failed"')
    (folder / "seed=2" / "history.jsonl").write_text(end)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.yaml").write_text("[")
    report.run(ReportJob(run_dir=[str(folder)]))
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Page:
    return Page((runs / "report.html").read_text())


def test_every_figure_has_every_run(page: Page) -> None:
    found = figures(page)
    assert {
        "Loss, nats per token", "Loss from 10% of the steps of each run on", "Validation loss",
        "Loss at MTP depth 1", "Loss of source web", f"Loss of source {NASTY}",
        "Validation loss of source web", "Throughput, tokens/s",
        "Gradient norm, before clipping", "Learning rate", "Expert load, the busiest layer",
    } <= found.keys()  # fmt: skip
    for figure in found.values():
        assert {trace["meta"]["run"] for trace in figure["data"]} == {0, 1, 2}


def test_last_values_stand_in_a_table(page: Page) -> None:
    assert "Last values" in page.texts
    for text in ("seed=1", "finished", "failed", "25.6k"):
        assert text in page.text


def test_settings_that_differ_stand_in_a_table_and_no_others(page: Page) -> None:
    after = page.text.partition("Settings that differ")[2]
    assert "schedule.peak_lr" in after
    assert "0.004" in after
    assert "model.pattern" not in after
    assert "run_dir" not in after


def test_failed_and_damaged_runs_are_said(page: Page) -> None:
    after = page.text.partition("Failed, or left out")[2]
    assert "all is trained" in after  # the cause in its history
    assert "damaged" in after


def test_texts_from_outside_stay_texts(page: Page) -> None:
    assert page.tags["script"] == 3  # data, library, ours
    assert page.addresses == []


def test_runs_that_are_the_same_have_no_table(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, steps=3, start=START)
    report.run(ReportJob(run_dir=[str(tmp_path / "a"), str(tmp_path / "b")]))
    text = (tmp_path / "report.html").read_text()
    assert "these runs have the same config" in text


def test_differences_are_compared_key_by_key() -> None:
    configs = [
        {"run_dir": "a", "train": {"seed": 1, "tokens": "2M"}, "edits": []},
        {"run_dir": "b", "train": {"seed": 2, "tokens": "2M"}, "edits": [{"kind": "x"}]},
        {"run_dir": "c", "train": {"seed": 1, "tokens": "2M", "new": None}, "edits": []},
    ]
    assert differing(configs) == {
        "edits": ["[]", '[{"kind": "x"}]', "[]"],
        "train.new": ["-", "-", "null"],
        "train.seed": ["1", "2", "1"],
    }


def test_a_page_of_many_runs_stays_small(tmp_path: Path) -> None:
    make(tmp_path / "0", steps=2_000, start=START)
    for number in range(1, 8):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("config.yaml", "metrics.jsonl", "history.jsonl"):
            (folder / name).symlink_to(tmp_path / "0" / name)
    report.run(ReportJob(run_dir=[str(tmp_path)]))
    text = (tmp_path / "report.html").read_text()
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert len(data[1]) < 3_000_000
