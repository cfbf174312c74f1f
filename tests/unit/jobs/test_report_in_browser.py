"""The report in a real browser, which has no network."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from hybrid_train.jobs import report
from hybrid_train.jobs.run_state import look
from tests.unit.jobs import browser
from tests.unit.jobs.synthetic_run import NASTY, make

FOUND = browser.find()
pytestmark = pytest.mark.skipif(
    FOUND is None, reason="needs Chromium (tests/install_system_parts.sh, or CHROMIUM=its path)"
)
# Runs in a copy of the page that is allowed to run it, and writes what it measured into the title.
MEASURE = """<script>
const boxes = [...document.querySelectorAll('svg, section, table')].map(e => {
  const box = e.getBoundingClientRect();
  return [e.tagName.toLowerCase(), box.left, box.width, box.height]; });
const over = [...document.querySelectorAll('svg text')].filter(e => {
  const box = e.getBoundingClientRect(), own = e.closest('svg').getBoundingClientRect();
  return box.right > own.right + 1 || box.left < own.left - 1 || box.bottom > own.bottom + 1; });
document.title = JSON.stringify({ width: innerWidth, needs: document.documentElement.scrollWidth,
  boxes: boxes, cut: over.map(e => e.textContent), height: document.body.scrollHeight,
  scripts: document.scripts.length });
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("run"), steps=300, start=1_700_000_000.0)
    path = folder / "report.html"
    path.write_text(report.report(look(folder)))
    return path


def measured(page: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", MEASURE)
    copy = tmp_path / "measured.html"
    copy.write_text(text)
    seen = browser.open_page(str(FOUND), copy, tmp_path / "profile", width=width)
    match = re.search(r"<title>(.*?)</title>", seen.dom, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1280, 500], ids=["desk", "hand"])
def test_the_page_lays_out(page: Path, tmp_path: Path, width: int) -> None:
    found = measured(page, tmp_path, width)
    assert found["needs"] <= found["width"] == width  # nothing sticks out at the side
    assert found["cut"] == []  # no label is cut off
    assert found["height"] > 1500
    assert found["scripts"] == 1  # that of this test
    pictures = [box for box in found["boxes"] if box[0] == "svg"]
    assert len(pictures) == 9
    assert all(w > 300 and h > 30 for _, _, w, h in pictures)


def test_nothing_is_asked_for_and_nothing_complains(page: Path, tmp_path: Path) -> None:
    seen = browser.open_page(str(FOUND), page, tmp_path)
    assert NASTY.replace("<", "&lt;").replace(">", "&gt;") in seen.dom
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


def test_curves_can_be_seen(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browser.open_page(str(FOUND), page, tmp_path / "profile", picture=picture)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    for colour in ("2f6fb5", "d1495b", "2e8b57"):  # train, validation, productive time
        wanted = [int(colour[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        alike = (abs(pixels - wanted) < 0.02).all(axis=-1)
        assert alike.sum() > 100, colour
