"""The report in a real browser, which has no network."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from hybrid_train.jobs import report
from hybrid_train.schema.job_roots import ReportJob
from tests.unit.jobs import browser
from tests.unit.jobs.synthetic_run import NASTY, make

FOUND = browser.find()
pytestmark = pytest.mark.skipif(
    FOUND is None, reason="needs Chromium (tests/install_system_parts.sh, or CHROMIUM=its path)"
)
START = 1_700_000_000.0
# Run in a copy of the page that is allowed to run them; what they find becomes the title.
MEASURE = """
const box = e => e.getBoundingClientRect();
const cut = [...document.querySelectorAll('.plot text')].filter(e => {
  const own = box(e), plot = box(e.closest('.plot'));
  return own.width && (own.right > plot.right + 1 || own.left < plot.left - 1
    || own.bottom > plot.bottom + 1); });
const plots = [...document.querySelectorAll('.plot')];
document.title = JSON.stringify({ width: innerWidth, needs: document.documentElement.scrollWidth,
  plots: plots.map(e => [box(e).width, box(e).height, e.querySelectorAll('svg').length]),
  cut: cut.map(e => e.textContent), height: document.body.scrollHeight,
  entries: [...document.querySelectorAll('.entry')].map(e => box(e).right) });
"""
CLICK = """
const plot = document.querySelector('.plot[data-figure="0"]');
const shown = () => plot.data.filter(t => t.yaxis !== 'y2' && t.opacity !== 0.32)
 .map(t => `${t.name}: ${t.meta.smoothing || ''}`);
const first = { shown: shown(), axis: plot.layout.yaxis.type, x: plot.data.map(t => t.x[0]) };
for (const [id, value] of [['smoothing', 'each step'], ['over', 'tokens']]) {
  const choice = document.getElementById(id);
  choice.value = value;
  choice.dispatchEvent(new Event('change')); }
const log = document.querySelector('input.log[data-figure="0"]');
log.click();
document.querySelector('button.entry').click();
document.title = JSON.stringify({ first, then: { shown: shown(), axis: plot.layout.yaxis.type,
  x: plot.data.map(t => t.x[0]) } });
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("run"), steps=300, start=START)
    report.run(ReportJob(run_dir=[str(folder)]))
    return folder / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(10):
        run = make(folder / f"peak_lr=0.00{seed}_seed={seed}", steps=100, start=START)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("peak_lr: 0.001", f"peak_lr: 0.00{seed}"))
    report.run(ReportJob(run_dir=[str(folder)]))
    return folder / "report.html"


def found_by(script: str, page: Path, tmp_path: Path, width: int = 1280) -> dict[str, Any]:
    """Run a script in a copy of the page, which writes what it found into the title."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    place = text.rindex("</body>")
    copy = tmp_path / "copy.html"
    copy.write_text(f"{text[:place]}<script>{script}</script>{text[place:]}")
    seen = browser.open_page(str(FOUND), copy, tmp_path / "profile", width=width)
    match = re.search(r"<title>(.*?)</title>", seen.dom, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "hand"])
@pytest.mark.parametrize("kind", ["page", "several"])
def test_the_page_lays_out(
    kind: str, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = found_by(MEASURE, request.getfixturevalue(kind), tmp_path, width)
    assert found["needs"] <= found["width"] == width  # nothing sticks out at the side
    assert found["cut"] == []  # no label is cut off
    assert max(found["entries"]) <= width
    assert found["height"] > 1500
    assert len(found["plots"]) == (9 if kind == "page" else 12)
    assert all(w > 300 and h > 60 and drawn for w, h, drawn in found["plots"])


@pytest.mark.parametrize("kind", ["page", "several"])
def test_nothing_is_asked_for_and_nothing_complains(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seen = browser.open_page(str(FOUND), request.getfixturevalue(kind), tmp_path / "profile")
    assert NASTY.replace("<", "&lt;").replace(">", "&gt;") in seen.dom
    assert 'class="plot js-plotly-plot" data-figure' in seen.dom
    assert 'class="plot" data-figure' not in seen.dom  # all were drawn
    assert seen.console == []
    assert seen.asked == []


def test_a_page_that_asks_and_complains_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<img src='http://example.org/a.png'><link rel='stylesheet' href='https://example.net/b'>"
        "<script>console.error('oh'); fetch('https://example.com/c')</script>"
    )
    seen = browser.open_page(str(FOUND), page, tmp_path / "profile")
    assert any("oh" in line for line in seen.console)
    hosts = ("example.com", "example.net", "example.org")
    assert sorted(line.split("/")[2] for line in seen.asked) == [*hosts]


def test_the_reader_chooses_smoothing_axes_and_curves(page: Path, tmp_path: Path) -> None:
    found = found_by(CLICK, page, tmp_path)
    first, then = found["first"], found["then"]
    smoothed = ["MTP depth 1: avg loss", "unigram: ", "train: avg loss", "validation: "]
    assert first["shown"] == smoothed
    assert first["axis"] == "linear"
    assert set(first["x"]) >= {1, 30}  # the first step; the first validation
    # The first entry of the legend, train, is hidden.
    assert then["shown"] == ["MTP depth 1: each step", "unigram: ", "validation: "]
    assert then["axis"] == "log"
    assert set(then["x"]) >= {256, 30 * 256}


def test_curves_can_be_seen(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browser.open_page(str(FOUND), page, tmp_path / "profile", picture=picture)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    for colour in ("2f6fb5", "d1495b", "2e8b57"):  # train, validation, productive time
        wanted = [int(colour[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        alike = (abs(pixels - wanted) < 0.02).all(axis=-1)
        assert alike.sum() > 100, colour
