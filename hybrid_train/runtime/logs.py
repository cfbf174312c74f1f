"""What processes say while they run: one logger, the rank in front, foreign chatter kept out."""

import logging
import sys
import warnings
from collections.abc import Callable

from hybrid_train.config.secrets import masked
from hybrid_train.runtime import ranks

# Libraries that speak of missing GPUs and optional parts at import: the start of a run says in its
# own words what it runs on.
_CHATTY = ("megatron", "torch.utils.cpp_extension", "torch.distributed", "matplotlib")


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


def say_through(write: Callable[[str], None] | None) -> None:
    """Let `write` say the messages from now on; None: stderr again."""
    _speaker.write = write or _to_stderr


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
