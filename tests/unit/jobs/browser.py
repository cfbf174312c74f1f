"""Opens pages in Chromium, without a display, and with a proxy that leads nowhere."""

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 120
_CONSOLE = re.compile(r":(?:INFO|WARNING|ERROR):CONSOLE[^\]]*\] (.*)")


def find() -> str | None:
    """The browser of this machine: CHROMIUM, or one of the usual names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page."""

    dom: str
    console: list[str]  # what the page complained about
    asked: list[str]  # hosts that anybody tried to reach


@contextmanager
def _dead_end() -> Iterator[tuple[int, list[str]]]:
    """A proxy that notes the first line of every request and hangs up."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                try:
                    client, _ = server.accept()
                except TimeoutError:
                    continue
                with client:
                    asked.append(client.recv(4096).decode(errors="replace").partition("\r\n")[0])

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield server.getsockname()[1], asked
        finally:
            over.set()
            thread.join()


def open_page(
    browser: str, page: Path, profile: Path, *, width: int = 1280, picture: Path | None = None
) -> Seen:
    """Open a file and wait until nothing moves any more; a picture is taken if it has a name."""
    with _dead_end() as (port, asked):
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            "--disable-sync", "--disable-extensions", "--enable-logging=stderr", "--v=0",
            f"--user-data-dir={profile}", f"--proxy-server=http://127.0.0.1:{port}",
            "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=5000",
            f"--window-size={width},2400",
        ]  # fmt: skip
        what = [f"--screenshot={picture}"] if picture else ["--dump-dom"]
        done = subprocess.run(
            [*command, *what, page.as_uri()],
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return Seen(done.stdout, _CONSOLE.findall(done.stderr), asked)
