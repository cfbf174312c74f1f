"""A web server for the files of a folder, with the faults that real ones have."""

import contextlib
import email.utils
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class HttpFolder:
    """What the server does, and what it was asked."""

    folder: Path
    url: str = ""
    fail_every: int = 0  # each so many-th request is answered by 503; 0: none
    ranges: bool = True  # whether it heeds Range
    says_version: bool = True  # whether it sends Last-Modified
    encodings: set[str] = field(default_factory=set)  # that clients took for bodies
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def bodies(self, suffix: str) -> list[str]:
        """The ranges that were sent of files with this suffix."""
        return [r for method, path, r in self.requests if method == "GET" and suffix in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    state: HttpFolder

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        state = self.state
        wanted = self.headers.get("Range", "")
        state.requests.append((self.command, self.path, wanted))
        if self.command == "GET":
            state.encodings.add(self.headers.get("Accept-Encoding", "any"))
        path = state.folder / self.path.lstrip("/")
        if state.fail_every and len(state.requests) % state.fail_every == 0:
            self.send_error(503)
        elif not path.is_file():
            self.send_error(404)
        else:
            self.send_file(path, wanted if state.ranges else "", with_body)

    def send_file(self, path: Path, wanted: str, with_body: bool) -> None:
        data = path.read_bytes()
        size, status, part = len(data), 200, data
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted):
            start, last = int(found[1]), int(found[2])
            if start >= size:
                self.send_error(416)
                return
            status, part = 206, data[start : last + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{size}")
        if self.state.says_version:
            self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime))
        self.end_headers()
        if with_body:
            with contextlib.suppress(ConnectionError):  # the client may have seen enough
                self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve(folder: Path, **faults: int) -> Iterator[HttpFolder]:
    """Serve a folder on a free port of this machine."""
    state = HttpFolder(folder, **faults)
    handler = type("Handler", (_Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
