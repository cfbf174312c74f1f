"""An S3-compatible server on this machine, that can be stopped, started again and made strict."""

import importlib.util
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest

BUCKET = "checkpoints"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test"}
_NEEDED = ("moto", "s3fs", "flask_cors")
# Of botocore and moto, at their import and in the threads of the server.
ignores_their_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class S3Server:
    """A server with one empty bucket; what it holds outlives a stop."""

    def __init__(self, port: int = 0) -> None:
        self._server: Any = None
        self.port = port
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer
        from werkzeug.serving import WSGIRequestHandler

        # A connection for each request: one that stays open would be served behind a stop, too.
        WSGIRequestHandler.protocol_version = "HTTP/1.0"
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        self.port = int(self._server.get_host_and_port()[1])

    def stop(self) -> None:
        self._server.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, content: bytes = b"") -> None:
        # As a form, which is the default, it would be taken apart.
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/{path}", content, plain)
        urllib.request.urlopen(request).close()

    def check_credentials(self) -> None:
        """Refuse the keys, which nobody has told it."""
        self.post("reset-auth", b"0")  # requests without a check that are left

    @property
    def files(self) -> Any:
        """What the bucket holds."""
        return fsspec.filesystem("s3", endpoint_url=self.endpoint, use_listings_cache=False)


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Serve a bucket, to which the variables of this process and its children point."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        pytest.skip("needs s3fs and moto: pip install s3fs 'moto[s3]' flask flask-cors")
    server = S3Server()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    # The driver tries each request again, too: half a minute passes before anybody hears of it.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server.post("reset")
    server.files.mkdir(BUCKET)
    try:
        yield server
    finally:
        server.post("reset-auth", b"inf")
        server.stop()
