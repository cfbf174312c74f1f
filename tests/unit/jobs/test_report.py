"""`hybrid-train report`: one page that says all, and runs nothing that came from outside."""

import html.parser
import re
from collections import Counter
from pathlib import Path

import pytest

from hybrid_train.jobs import report
from hybrid_train.jobs.run_state import look
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.report import ReportJob
from tests.unit.jobs.synthetic_run import NASTY, make
from tests.unprivileged import modes_count

START = 1_700_000_000.0
EMPTY = {"meta", "br", "img"}  # tags that need no end


class Page(html.parser.HTMLParser):
    """Tags, texts and addresses of a page; ends must match beginnings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [v or "" for name, v in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def test_the_page_holds_every_picture_and_table(tmp_path: Path) -> None:
    page = Page(report.report(look(make(tmp_path, steps=200, start=START))))
    for title in (
        "Loss, nats per token", "Loss of each source", "Validation loss of each source",
        "Throughput, tokens/s", "Gradient norm, before clipping", "Learning rate",
        "Expert load by layer", "Attempts", "Where the time went", "History of attempts", "Events",
        "Summary", "Config",
    ):  # fmt: skip
        assert title in page.texts
    assert page.tags["svg"] == 9  # the first of these has a second picture, of the later steps
    assert "failed, killed" in page.text
    assert "8 on 2 nodes (n<1>, job 771)" in page.text
    assert "pattern: ME*-/*E" in page.text  # the config


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    page = Page(report.report(look(make(tmp_path, steps=60, start=START))))
    assert page.tags["script"] == 0
    assert f"{NASTY} " in page.text  # in the legend, with the last loss
    assert f"rank 3 was killed (<b>{NASTY}</b>)" in page.text


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    text = report.report(look(make(tmp_path, steps=60, start=START)))
    assert Page(text).addresses == []
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_of_a_long_run_is_small_and_keeps_its_spike(tmp_path: Path) -> None:
    short = report.report(look(make(tmp_path / "short", steps=2_000, start=START)))
    long = report.report(look(make(tmp_path / "long", steps=20_000, start=START)))
    assert len(long) < 1.2 * len(short) < 400_000
    assert ">40<" in long or ">20<" in long  # the gradient norm goes to 40 in a single step


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=3, start=START)
    for name in ("metrics.jsonl", "history.jsonl"):
        (folder / name).unlink()
    page = Page(report.report(look(folder)))
    assert page.tags["svg"] == 0
    assert "not started" in page.texts


def test_credentials_that_an_older_file_holds_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, steps=3, start=START)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with (folder / "config.yaml").open("a") as file:
        file.write("note: https://me:pa55word@host.org 0123456789abcdef\n")
    text = report.report(look(folder))
    assert "https://&lt;hidden&gt;@host.org &lt;hidden&gt;" in text
    assert "pa55word" not in text


def test_the_file_is_written_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "run", steps=3, start=START)
    other = tmp_path / "new" / "page.html"
    for output, path in ((None, folder / "report.html"), (str(other), other)):
        report.run(ReportJob(run_dir=str(folder), output=output))
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
        report.run(ReportJob(run_dir=str(folder), output=output))
    assert sorted(tmp_path.iterdir()) == before
