import io
import sys

import pytest

from hybrid_train.runtime.logs import accept_any_letter


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("utf-8", "läuft → \udcff", b"l\xc3\xa4uft \xe2\x86\x92 \xff"),
        ("latin-1", "läuft → \udce4", b"l\xe4uft \\u2192 \xe4"),
        ("ascii", "läuft 😀", b"l\\xe4uft \\U0001f600"),
    ],
)
def test_every_letter_is_written_in_every_encoding(
    encoding: str, text: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", file)
    accept_any_letter()
    file.write(text)
    file.flush()
    assert file.buffer.getvalue() == written  # type: ignore[attr-defined]
