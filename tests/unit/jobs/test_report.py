"""`hybrid-train report`: one page that says all, and runs nothing that came from outside."""

import re
from pathlib import Path

import pytest

from hybrid_train.jobs import report
from hybrid_train.jobs.report import SCRIPT, positions, script_hash
from hybrid_train.jobs.run_state import look
from hybrid_train.schema.job_roots import ReportJob
from hybrid_train.schema.problems import UserError
from hybrid_train.tracking import plotly
from tests.unit.jobs.report_page import Page, figures
from tests.unit.jobs.synthetic_run import NASTY, make
from tests.unprivileged import modes_count

START = 1_700_000_000.0


def test_the_page_holds_every_picture_and_table(tmp_path: Path) -> None:
    page = Page(report.page_of_run(look(make(tmp_path, steps=200, start=START))))
    for title in (
        "Loss, nats per token", "Loss of each source", "Validation loss of each source",
        "Throughput, tokens/s", "Gradient norm, before clipping", "Learning rate",
        "Expert load by layer", "Attempts", "Where the time went", "History of attempts", "Events",
        "Summary", "Config",
    ):  # fmt: skip
        assert title in page.texts
    assert list(figures(page)) == [
        "Loss, nats per token", "The same from 10% of the steps on", "Loss of each source",
        "Validation loss of each source", "Throughput, tokens/s",
        "Gradient norm, before clipping", "Learning rate", "Expert load by layer", "Attempts",
    ]  # fmt: skip
    assert "failed, killed" in page.text
    assert "8 on 2 nodes (n<1>, job 771)" in page.text
    assert "pattern: ME*-/*E" in page.text  # the config


def test_the_losses_have_their_last_values_in_the_legend(tmp_path: Path) -> None:
    state = look(make(tmp_path, steps=200, start=START))
    page = Page(report.page_of_run(state))
    (loss, *_) = page.data["figures"]
    names = [trace["name"] for trace in loss["data"] if trace["name"]]
    assert list(dict.fromkeys(names)) == ["MTP depth 1", "unigram", "train", "validation"]
    assert f"train {state.smoothed_loss:.3f}" in page.texts
    assert f"{state.smoothed_loss:.4f}" in page.texts  # at the head of the page
    assert "unigram 7.000" in page.texts


def test_attempts_and_events_are_marked_in_the_curves(tmp_path: Path) -> None:
    page = Page(report.page_of_run(look(make(tmp_path, steps=60, start=START))))
    texts = [text for trace in page.data["figures"][0]["data"] for text in trace.get("text", ())]
    assert "attempt 2 went on from step 20" in texts
    assert any(text.startswith("skipped: step 30: reason spike") for text in texts)


def test_tokens_stand_beside_the_steps(tmp_path: Path) -> None:
    page = Page(report.page_of_run(look(make(tmp_path, steps=60, start=START))))
    assert page.data["runs"] == [{"steps": [0, 60], "tokens": [0, 60 * 256]}]
    ramp = [{"step": n, "tokens": 8.0 * n if n < 5 else 16.0 * n - 32} for n in range(1, 9)]
    assert positions(ramp) == {"steps": [0, 4, 8], "tokens": [0, 32, 96]}


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    page = Page(report.page_of_run(look(make(tmp_path, steps=60, start=START))))
    assert page.tags["script"] == 3  # data, plotly.js, ours
    assert f"{NASTY} " in page.text  # in the legend, with the last loss
    assert f"rank 3 was killed (<b>{NASTY}</b>)" in page.text


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    text = report.page_of_run(look(make(tmp_path, steps=60, start=START)))
    assert Page(text).addresses == []
    assert "default-src 'none'" in text
    own = text.replace(plotly.library(), "")
    assert "url(" not in own
    assert "@import" not in own


def test_the_page_runs_its_own_scripts_and_no_others(tmp_path: Path) -> None:
    text = report.page_of_run(look(make(tmp_path, steps=3, start=START)))
    rules = re.search(r"script-src([^\"]*)\"", text)
    assert rules is not None
    allowed = rules[1].split()
    scripts = [plotly.library(), SCRIPT.read_text()]
    assert allowed == [f"'{script_hash(script)}'" for script in scripts]
    assert all(f"<script>{script}</script>" in text for script in scripts)


def test_the_page_of_a_long_run_is_small_and_keeps_its_spike(tmp_path: Path) -> None:
    short = report.page_of_run(look(make(tmp_path / "short", steps=2_000, start=START)))
    long = report.page_of_run(look(make(tmp_path / "long", steps=20_000, start=START)))
    own = len(long) - len(plotly.library())
    assert own < 1.2 * (len(short) - len(plotly.library())) < 1_500_000
    norm = figures(Page(long))["Gradient norm, before clipping"]
    assert 40 in norm["data"][0]["y"]  # in a single step
    assert norm["layout"]["yaxis"]["type"] == "log"


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=3, start=START)
    for name in ("metrics.jsonl", "history.jsonl"):
        (folder / name).unlink()
    page = Page(report.page_of_run(look(folder)))
    assert figures(page) == {}
    assert "not started" in page.texts


def test_credentials_that_an_older_file_holds_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, steps=3, start=START)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with (folder / "config.yaml").open("a") as file:
        file.write("note: https://me:pa55word@host.org 0123456789abcdef\n")
    text = report.page_of_run(look(folder))
    assert "https://&lt;hidden&gt;@host.org &lt;hidden&gt;" in text
    assert "pa55word" not in text


def test_the_file_is_written_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "run", steps=3, start=START)
    other = tmp_path / "new" / "page.html"
    for output, path in ((None, folder / "report.html"), (str(other), other)):
        report.run(ReportJob(run_dir=[str(folder)], output=output))
        assert path.read_text().startswith("<!doctype html>")
        assert str(path) in capsys.readouterr().out
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("there", "output = there is a folder; name a file: there/report.html"),
        ("there/", "output = there is a folder; name a file: there/report.html"),
        ("file/report.html", "file/report.html cannot be written: "),
        ("closed/report.html", "closed/report.html cannot be written: Permission denied"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_a_place_that_takes_no_report_is_named(
    output: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run", steps=3, start=START)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "closed").mkdir(0o555)
    (tmp_path / "file").write_text("here")
    before = sorted(tmp_path.iterdir())
    with modes_count(), pytest.raises(UserError, match=re.escape(words)):
        report.run(ReportJob(run_dir=[str(folder)], output=output))
    assert sorted(tmp_path.iterdir()) == before
