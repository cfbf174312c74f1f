"""What processes say: one logger, the rank in front, chatter of libraries kept out, any letter.

Python ends a program that prints a letter which the encoding lacks, as under `LC_ALL=C` or
`PYTHONIOENCODING=latin-1`; and under any encoding, one that repeats a name from the command line
whose bytes are no text. `accept_any_letter` prevents that.
"""

import codecs
import io
import logging
import sys
import warnings
from collections.abc import Callable

from hybrid_train.config.secrets import masked
from hybrid_train.runtime import ranks

_ERROR_HANDLER = "hybrid_train.any_letter"  # of encodings, as Python knows it
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF  # how Python keeps bytes that are no text (PEP 383)
# Libraries that speak of missing GPUs and optional parts at import: the start of a run says in its
# own words what it runs on.
_CHATTY = ("megatron", "torch.utils.cpp_extension", "torch.distributed", "matplotlib")


def start_logging() -> None:
    """Send this project's messages to stderr: all of the main process, warnings of the others."""
    logger = logging.getLogger("hybrid_train")
    logger.setLevel(logging.INFO if ranks.is_main() else logging.WARNING)
    logger.propagate = False
    prefix = f"[rank {ranks.rank()}] " if ranks.world_size() > 1 else ""
    _speaker.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.handlers = [_speaker]
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def say_through(write: Callable[[str], None] | None) -> None:
    """Let `write` say the messages from now on; None: stderr again."""
    _speaker.write = write or _to_stderr


class _Speaker(logging.Handler):
    """Says each message through `write`, which a progress bar may take over."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Callable[[str], None] = _to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        self.write(masked(self.format(record)))


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


_speaker = _Speaker()


def accept_any_letter() -> None:
    """Write bytes that were no text as they came in, and letters that an encoding lacks by number.

    So a name that is printed can be typed, and no message is lost.
    """
    codecs.register_error(_ERROR_HANDLER, _as_written)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _as_written(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    if _FIRST_BYTE <= ord(letter) <= _LAST_BYTE:
        return bytes([ord(letter) - _FIRST_BYTE + 0x80]), error.start + 1
    return letter.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1
