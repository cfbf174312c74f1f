"""Settings and commands as text that can be typed as it stands, in bash and in zsh.

Two readers take letters for their own: the shell and Hydra's grammar of overrides. Every command
and every setting that a message proposes is written here, so that both give back what was meant.
"""

import re
import shlex

from hydra.core.override_parser.types import Quote, QuotedString

# What Hydra reads as plain text. A number is read as one, but a setting of text keeps its letters.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+-]+")


def setting(key: str, value: object) -> str:
    """Return the override that gives a setting of text this value: `run_dir="a (2)"`."""
    return f"{key}={quoted(str(value))}"


def quoted(text: str) -> str:
    """Return a text as Hydra's grammar reads it, in quotes where it needs them."""
    if _PLAIN.fullmatch(text) and text.lower() != "null":
        return text
    return str(QuotedString(text, Quote.double).with_quotes())


def typed(*words: str) -> str:
    """Return words as they are typed into a shell, `typed(setting("run_dir", path))` for one."""
    # What shlex leaves bare means nothing to zsh either, but for a = that begins a word.
    return " ".join(f"'{word}'" if word.startswith("=") else shlex.quote(word) for word in words)


def command(*words: str) -> str:
    """Return a command of the program: `hybrid-train status run_dir=runs/first`."""
    return typed("hybrid-train", *words)
