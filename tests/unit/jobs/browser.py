"""Opens pages in Chromium, without a display, and with a proxy that leads nowhere."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 120
NOBODY = 9  # a port where nobody listens
_ITSELF = "not an origin"  # who began what the browser asks for by itself
_CONSOLE = re.compile(r":(?:INFO|WARNING|ERROR):CONSOLE[^\]]*\] (.*)")


def find() -> str | None:
    """The browser of this machine: CHROMIUM, or one of the usual names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page."""

    dom: str
    console: list[str]  # what the page complained about
    asked: list[str]  # addresses that it tried to reach


def open_page(
    browser: str, page: Path, profile: Path, *, width: int = 1280, picture: Path | None = None
) -> Seen:
    """Open a file and wait until nothing moves any more; a picture is taken if it has a name."""
    requests = profile / "requests.json"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--disable-sync", "--disable-extensions", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={profile}", f"--log-net-log={requests}",
        f"--proxy-server=http://127.0.0.1:{NOBODY}", "--proxy-bypass-list=<-loopback>",
        "--virtual-time-budget=5000", f"--window-size={width},2400",
    ]  # fmt: skip
    what = [f"--screenshot={picture}"] if picture else ["--dump-dom"]
    profile.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, *what, page.as_uri()],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Seen(done.stdout, _CONSOLE.findall(done.stderr), _asked_by_the_page(requests))


def _asked_by_the_page(requests: Path) -> list[str]:
    """Read from the browser's own log which addresses a page has asked for.

    The browser asks for some by itself: the time, updates of its parts, a dictionary. Those have no
    page that began them.
    """
    events = json.loads(requests.read_text())["events"]
    begun = [event["params"] for event in events if "initiator" in event.get("params", {})]
    assert events, "the browser kept no log"
    return [one["url"] for one in begun if one["initiator"] != _ITSELF and "url" in one]
