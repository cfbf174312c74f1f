"""What a process says: every text can be written, whatever encoding a terminal or a file has.

Under `LC_ALL=C`, `PYTHONIOENCODING=latin-1` and their like Python ends a program that says a letter
which the encoding lacks; and everywhere, one that repeats a name from the command line whose bytes
are no text.
"""

import codecs
import io
import sys

_NAME = "hybrid_train.any_letter"
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF  # how Python keeps bytes that are no text (PEP 383)


def accept_any_letter() -> None:
    """Write bytes that were no text as they came in, and letters that an encoding lacks by number.

    So a name that is printed can be typed, and no message is lost.
    """
    codecs.register_error(_NAME, _written)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    if _FIRST_BYTE <= ord(letter) <= _LAST_BYTE:
        return bytes([ord(letter) - _FIRST_BYTE + 0x80]), error.start + 1
    return letter.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1
